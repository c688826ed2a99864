"""bifrost-rt: edge inference for Bifrost-1 (arXiv 2508.05954).

import bifrost_rt
result = bifrost_rt.Generator("engines/sets/demo").run("a red circle", seed=1)
result.save("out.png")
"""

from __future__ import annotations

from bifrost_rt.chat import ChatResult
from bifrost_rt.errors import (
    BackendError,
    BifrostError,
    BudgetError,
    EngineInputError,
    EngineSetError,
    GeneratorStateError,
    IntegrityError,
    NumericsError,
    RequestError,
    RequestTypeError,
    TextFileError,
)
from bifrost_rt.generator import Generator
from bifrost_rt.result import Result

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BifrostError",
    "BudgetError",
    "ChatResult",
    "EngineInputError",
    "EngineSetError",
    "Generator",
    "GeneratorStateError",
    "IntegrityError",
    "NumericsError",
    "RequestError",
    "RequestTypeError",
    "Result",
    "TextFileError",
    "__version__",
]
