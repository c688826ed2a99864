"""`docs/commands.md`, made from the parser.

    python -m bifrost_rt.cli.reference > docs/commands.md

Written out here rather than taken from argparse, whose layout differs between Python's versions.
"""

from __future__ import annotations

import argparse

from bifrost_rt.cli.options import MODULES, parser

TOP = """# Commands

What `bifrost-rt COMMAND --help` says; made by `python -m bifrost_rt.cli.reference`. Data goes to
stdout, everything else to stderr. The status is 0, 1 for an error, 2 for options that are not
understood, 130 when interrupted; `bifrost-rt --debug COMMAND` shows the trace of an error.
"""


def document() -> str:
    """Return the page, in Markdown."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    help_of = {choice.dest: choice.help for choice in commands._choices_actions}
    parts = [TOP]
    for name, command in commands.choices.items():
        parts.append(f"## bifrost-rt {name}\n\n{_sentence(help_of[name])}\n")
        if name in MODULES:
            module = MODULES[name].module
            parts.append(f"Its options are those of `python -m {module} --help`.\n")
        elif rows := [_row(action) for action in command._actions if action.dest != "help"]:
            parts.append("| | |\n|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def _sentence(text: str | None) -> str:
    assert text
    return text[0].upper() + text[1:] + "."


def _row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    if action.option_strings:
        name = ", ".join(f"`{option}`" for option in action.option_strings[:-1])
        name += (", " if name else "") + f"`{action.option_strings[-1]}{value}`"
    else:
        name = f"`{action.metavar or action.dest}{' …' if action.nargs == '*' else ''}`"
    return f"| {name} | {action.help or ''} |\n"


if __name__ == "__main__":
    print(document(), end="")
