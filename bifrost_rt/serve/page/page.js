// The page: one job at a time, seen becoming, a history of how images were made, images of which a
// part is drawn anew, and questions about an image, whose answers come word by word.
// Requests carry a token where the server asks for one, so images and events come by fetch.
"use strict";

const $ = (id) => document.getElementById(id);
const HISTORY = "bifrost-rt history";
const KEPT = 24;
const NAMES = {
  seed: "Seed", num_inference_steps: "Denoising steps", decoding_steps: "Decoding steps",
  controlnet_conditioning_scale: "Weight of the latents", cfg_weight: "Guidance of the MLLM",
  guidance_scale: "Embedded guidance", num_images_per_prompt: "Images",
};
let about = null;
let running = null;   // the job's id
let shown = null;     // the entry of the history that is on the page
let asked = null;     // the image that is asked about
let edited = null;    // {blob, bitmap, cells, at}: the image that is edited, what is marked, the cursor
let asking = null;    // ends the answer that is on its way
const blobs = new Map(); // entry -> images, as long as the page is open
const befores = new Map(); // entry of an edit -> its image, as long

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const token = $("token").value.trim();
  if (token) headers.Authorization = `Bearer ${token}`;
  if (typeof options.body === "string") headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("token-row").hidden = false;
    $("token").focus();
  }
  const body = await answer.json().catch(() => null);
  const wait = answer.headers.get("Retry-After");
  throw new Error(body?.error?.message ?? `the server answered ${answer.status}` +
    (wait ? `; try again in ${wait} s` : ""));
}

async function* events(path, options) {
  const reader = (await call(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n");
      const get = (key) => lines.filter((l) => l.startsWith(`${key}: `)).map((l) => l.slice(key.length + 2)).join("\n");
      if (get("data") && get("data") !== "[DONE]") yield [get("event"), JSON.parse(get("data"))];
    }
  }
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function requested() {
  const body = { prompt: $("prompt").value, previews: about !== null && about.no_previews === null };
  for (const input of document.querySelectorAll("#options input[name]")) {
    if (input.value !== "" && !input.parentElement.hidden) body[input.name] = Number(input.value);
  }
  if ($("think").checked) body.think = true;
  return body;
}

const draw = () => work("/v1/jobs", async () => JSON.stringify(requested()));

async function work(path, body, before = null) {
  if (running !== null || !$("form").reportValidity()) return;
  running = "";
  busy(true);
  say("Asking …");
  try {
    if (about === null) await introduce();
    const job = await (await call(path, { method: "POST", body: await body() })).json();
    running = job.id;
    for await (const [name, data] of events(`/v1/jobs/${job.id}/events`)) {
      if (name === "preview") preview(data);
      else if (name === "progress") progress(data);
      else await finish(name, data, before);
    }
  } catch (error) {
    say(error.message, true);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  $("draw").disabled = is;
  $("edit").disabled = is || !marked();
  $("cancel").disabled = !is;
  $("progress").hidden = !is;
  if (is) $("progress").removeAttribute("value");
}

function progress(job) {
  if (job.state === "queued") {
    say(job.position ? `Waiting, ${job.position} before this.` : "Waiting.");
  } else if (job.stage === "thinking") {
    say(`Thinking: ${job.thought}`);
  } else if (job.stage) {
    const all = job.parameters.decoding_steps + job.parameters.num_inference_steps;
    const before = job.stage === "decoding" ? 0 : job.parameters.decoding_steps;
    $("progress").value = (before + job.step) / all;
    say(`${job.stage === "decoding" ? "Decoding" : "Denoising"}, step ${job.step} of ${job.steps}.`);
  }
}

function preview(data) {
  let image = $("images").querySelector("img.preview");
  if (!image) {
    image = Object.assign(new Image(), { className: "preview", alt: "preview" });
    $("images").replaceChildren(image);
    $("facts").replaceChildren();
    $("again").hidden = true;
  }
  image.src = `data:image/webp;base64,${data.webp}`;
  image.dataset.step = data.step;
}

async function finish(state, job, before) {
  if (state !== "done") {
    $("images").replaceChildren();
    say(state === "cancelled" ? "Cancelled." : job.error.message, state === "failed");
    return;
  }
  const images = [];
  for (const path of job.images) images.push(await (await call(path)).blob());
  const entry = { parameters: job.parameters, thumb: await thumbnail(images[0]) };
  blobs.set(entry, images);
  if (before) {
    entry.edited = true;
    befores.set(entry, before);
  }
  remember(entry);
  show(entry);
  say([`Drawn in ${job.seconds.total.toFixed(2)} s.`, ...job.warnings].join(" "));
}

async function thumbnail(blob) {
  const size = 160, canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
  canvas.getContext("2d").drawImage(await createImageBitmap(blob), 0, 0, size, size);
  return canvas.toDataURL("image/webp", 0.8);
}

function show(entry) {
  shown = entry;
  const { prompt, ...facts } = entry.parameters;
  const images = blobs.get(entry) ?? [];
  for (const image of $("images").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("images").replaceChildren(...images.map((blob, i) => {
    const url = URL.createObjectURL(blob);
    const link = Object.assign(document.createElement("a"), {
      className: "download", href: url, textContent: "Download",
      download: `bifrost-${facts.seed}${images.length > 1 ? `-${i}` : ""}.png`,
    });
    const caption = document.createElement("figcaption");
    caption.append(link);
    if (about !== null && canAsk()) {
      const ask = Object.assign(document.createElement("button"), { type: "button", textContent: "Ask about it" });
      ask.addEventListener("click", () => { take(blob); $("question").focus(); });
      caption.append(ask);
    }
    if (about !== null && canEdit()) {
      const edit = Object.assign(document.createElement("button"), { type: "button", textContent: "Edit it" });
      edit.addEventListener("click", () => takeEdit(blob).then(() => $("mask").focus()));
      caption.append(edit);
    }
    const figure = document.createElement("figure");
    figure.append(...beside(Object.assign(new Image(), { src: url, alt: prompt }), befores.get(entry)), caption);
    return figure;
  }));
  $("facts").replaceChildren(...[["Prompt", prompt], ...Object.entries(NAMES)
    .filter(([name]) => name in facts && !(name === "guidance_scale" && about?.guidance_scale === null))
    .map(([name, title]) => [title, facts[name]])]
    .flatMap(([title, value]) => [
      Object.assign(document.createElement("dt"), { textContent: title }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    ]));
  $("again").hidden = false;
}

// An image, and over it the image that it was made from, as far as a slider says.
function beside(after, before) {
  if (!before) return [after];
  const over = Object.assign(new Image(), { className: "before", src: URL.createObjectURL(before), alt: "before" });
  const compare = Object.assign(document.createElement("div"), { className: "compare" });
  compare.append(after, over);
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, value: 0 });
  slider.ariaLabel = "How much of the image before is shown, from the left";
  const set = () => { over.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; };
  slider.addEventListener("input", set);
  set();
  const label = document.createElement("label");
  label.append("After", slider, "Before");
  return [compare, label];
}

const canEdit = () => about.no_vision === null;
const marked = () => edited !== null && edited.cells.some(Boolean);
const side = () => about.grid;

async function takeEdit(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return say("The image cannot be read.", true);
  }
  edited = { blob, bitmap, cells: new Array(side() ** 2).fill(false), at: 0, cursor: false };
  $("painting").hidden = false;
  paintMask();
}

// The square in the middle of the image, which is what is read of it.
function middle({ width, height }) {
  const edge = Math.min(width, height);
  return [Math.floor((width - edge) / 2), Math.floor((height - edge) / 2), edge];
}

function paintMask() {
  const canvas = $("mask"), n = side(), cell = Math.ceil(640 / n), [left, top, edge] = middle(edited.bitmap);
  canvas.width = canvas.height = cell * n;
  const context = canvas.getContext("2d");
  context.drawImage(edited.bitmap, left, top, edge, edge, 0, 0, canvas.width, canvas.height);
  context.fillStyle = "rgba(255, 0, 120, .5)";
  edited.cells.forEach((is, i) => is && context.fillRect((i % n) * cell, Math.floor(i / n) * cell, cell, cell));
  if (edited.cursor) {
    for (const [color, inset] of [["#000", 1.5], ["#fff", 4.5]]) {
      context.lineWidth = 3;
      context.strokeStyle = color;
      context.strokeRect((edited.at % n) * cell + inset, Math.floor(edited.at / n) * cell + inset,
        cell - 2 * inset, cell - 2 * inset);
    }
  }
  const count = edited.cells.filter(Boolean).length;
  const place = `Row ${Math.floor(edited.at / n) + 1}, column ${edited.at % n + 1}: ` +
    `${edited.cells[edited.at] ? "marked" : "kept"}. `;
  $("mask-state").textContent = `${edited.cursor ? place : ""}${count} of ${n * n} cells are marked.`;
  $("clear").disabled = count === 0;
  $("edit").disabled = count === 0 || running !== null;
}

function cellAt(event) {
  const box = $("mask").getBoundingClientRect(), n = side();
  const place = (at, from, size) => Math.floor(Math.min(Math.max((at - from) / size, 0), 0.9999) * n);
  return [place(event.clientX, box.left, box.width), place(event.clientY, box.top, box.height)];
}

// Marks every cell between two, so that a fast hand leaves no gaps.
function stroke([x0, y0], [x1, y1], value) {
  const steps = Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0), 1);
  for (let i = 0; i <= steps; i++) {
    const x = Math.round(x0 + (x1 - x0) * i / steps), y = Math.round(y0 + (y1 - y0) * i / steps);
    edited.cells[y * side() + x] = value;
  }
  paintMask();
}

function moveCursor(dx, dy, mark) {
  const n = side(), x = edited.at % n, y = Math.floor(edited.at / n);
  if (mark) edited.cells[edited.at] = true;
  edited.at = Math.min(Math.max(y + dy, 0), n - 1) * n + Math.min(Math.max(x + dx, 0), n - 1);
  if (mark) edited.cells[edited.at] = true;
  paintMask();
}

// The pixels of an edge of n cells: those within a cell, and those that two cells share.
function strips(edge, n) {
  return Array.from({ length: n }, (_, k) => {
    const [from, to] = [k * edge / n, (k + 1) * edge / n];
    const own = { cells: [k], from: Math.ceil(from), to: Math.floor(to) };
    const shared = { cells: [k, k + 1], from: Math.floor(to), to: Math.ceil(to) };
    return k + 1 < n ? [own, shared] : [own];
  }).flat();
}

// Transparent where it is marked, of the image's own size: pixels all of whose cells are marked.
function maskFile() {
  const { width, height } = edited.bitmap, [left, top, edge] = middle(edited.bitmap), n = side();
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  for (const y of strips(edge, n)) for (const x of strips(edge, n)) {
    if (!y.cells.every((row) => x.cells.every((column) => edited.cells[row * n + column]))) continue;
    const own = x.cells.length + y.cells.length === 2 ? 1 : 0; // a cell of no whole pixel has one
    context.clearRect(
      left + x.from, top + y.from, Math.max(x.to - x.from, own), Math.max(y.to - y.from, own));
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const edit = () => marked() && work("/v1/jobs/edits", async () => {
  const form = new FormData();
  for (const [name, value] of Object.entries(requested())) form.append(name, value);
  if (!$("keep").checked) form.append("keep_pixels", false);
  form.append("image", edited.blob, "image");
  form.append("mask", await maskFile(), "mask.png");
  return form;
}, edited.blob);

const canAsk = () => about.no_chat === null && about.no_vision === null;

function take(blob) {
  if ($("seen").src) URL.revokeObjectURL($("seen").src);
  asked = blob;
  $("seen").src = URL.createObjectURL(blob);
  $("seen").hidden = false;
  answered("");
}

function answered(text, isError = false) {
  $("answer").textContent = text;
  $("answer").classList.toggle("error", isError);
  $("answer-facts").textContent = "";
}

function dataURI(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error("the image cannot be read")));
    reader.readAsDataURL(blob);
  });
}

async function ask() {
  if (asking !== null) return;
  if (asked === null) return answered("Drop an image first, or choose a file.", true);
  asking = new AbortController();
  $("ask").disabled = true;
  $("stop").disabled = false;
  $("answer").ariaBusy = "true"; // read out when it is whole
  answered("…");
  let text = "";
  try {
    const content = [
      { type: "image_url", image_url: { url: await dataURI(asked) } },
      { type: "text", text: $("question").value.trim() || $("question").placeholder },
    ];
    const body = JSON.stringify({
      messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
    });
    const options = { method: "POST", body, signal: asking.signal };
    for await (const [, data] of events("/v1/chat/completions", options)) {
      if (data.error) throw new Error(data.error.message);
      text += data.choices[0]?.delta.content ?? "";
      if (text) $("answer").textContent = text;
      if (data.usage) {
        const { prompt_tokens, completion_tokens } = data.usage;
        $("answer-facts").textContent = `${prompt_tokens} tokens read, ${completion_tokens} said.`;
      }
    }
    if (!text) answered("The model said nothing.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    answered(stopped ? `${text} (stopped)` : error.message, !stopped);
  } finally {
    asking = null;
    $("answer").ariaBusy = "false";
    $("ask").disabled = false;
    $("stop").disabled = true;
  }
}

function fill() {
  $("prompt").value = shown.parameters.prompt;
  $("think").checked = false; // the prompt is what was thought
  for (const input of document.querySelectorAll("#options input[name]")) {
    input.value = shown.parameters[input.name === "n" ? "num_images_per_prompt" : input.name] ?? "";
  }
  $("prompt").focus();
}

function load() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch {
    return [];
  }
}

let history_ = load();

function remember(entry) {
  for (const old of history_.splice(KEPT - 1)) {
    blobs.delete(old);
    befores.delete(old);
  }
  history_.unshift(entry);
  localStorage.setItem(HISTORY, JSON.stringify(history_));
  list();
}

function list() {
  $("history").replaceChildren(...history_.map((entry) => {
    const button = document.createElement("button");
    button.append(Object.assign(new Image(), { src: entry.thumb, alt: entry.parameters.prompt }));
    button.title = entry.parameters.prompt;
    button.addEventListener("click", () => {
      show(entry);
      if (blobs.has(entry)) return say("From the history.");
      fill();
      say(entry.edited
        ? "Only how it was made is kept. Its settings are filled in; its image and what was marked are not kept."
        : "Only how it was made is kept. Its settings are filled in: Draw makes the same image.");
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  $("forget").hidden = history_.length === 0;
}

async function introduce() {
  about = await (await call("/v1/about")).json();
  $("about").textContent = `${about.model}, ${about.size} px`;
  for (const input of document.querySelectorAll("#options input")) {
    if (input.name in about) input.placeholder = about[input.name] ?? "";
  }
  const embedded = document.querySelector("[name=guidance_scale]").parentElement;
  embedded.hidden = about.guidance_scale === null;
  $("think").parentElement.hidden = about.no_chat !== null;
  document.querySelector("[name=n]").max = about.max_images;
  document.querySelector("[name=num_inference_steps]").max = about.max_steps;
  $("prompt").maxLength = about.max_prompt;
  $("asking").hidden = !canAsk();
  $("editing").hidden = !canEdit();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
});
const cancel = () => running && call(`/v1/jobs/${running}`, { method: "DELETE" }).catch((e) => say(e.message, true));
$("cancel").addEventListener("click", cancel);
const stop = () => asking?.abort();
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { cancel(); stop(); } });
$("ask-form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("stop").addEventListener("click", stop);
$("file").addEventListener("change", () => { if ($("file").files[0]) take($("file").files[0]); });
function drops(area, taken) {
  for (const name of ["dragover", "dragleave", "drop"]) {
    area.addEventListener(name, (event) => {
      event.preventDefault();
      area.classList.toggle("over", name === "dragover");
      const file = event.dataTransfer.files[0];
      if (name === "drop" && file) taken(file);
    });
  }
}
drops($("drop"), take);
drops($("edit-drop"), takeEdit);
$("edit-file").addEventListener("change", () => { if ($("edit-file").files[0]) takeEdit($("edit-file").files[0]); });
$("edit").addEventListener("click", edit);
$("clear").addEventListener("click", () => { edited.cells.fill(false); paintMask(); $("mask").focus(); });
let hand = null;  // the pointer that marks: its last cell, and whether it marks or clears
$("mask").addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || hand !== null) return;
  $("mask").setPointerCapture(event.pointerId);
  const at = cellAt(event);
  hand = { id: event.pointerId, at, value: !edited.cells[at[1] * side() + at[0]] };
  stroke(at, at, hand.value);
});
$("mask").addEventListener("pointermove", (event) => {
  if (hand?.id !== event.pointerId) return;
  const at = cellAt(event);
  stroke(hand.at, at, hand.value);
  hand.at = at;
});
for (const name of ["pointerup", "pointercancel"]) {
  $("mask").addEventListener(name, (event) => { if (hand?.id === event.pointerId) hand = null; });
}
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
$("mask").addEventListener("keydown", (event) => {
  if (event.key in ARROWS) moveCursor(...ARROWS[event.key], event.shiftKey);
  else if (event.key === " ") edited.cells[edited.at] = !edited.cells[edited.at];
  else if (event.key === "Delete" || event.key === "Backspace") edited.cells.fill(false);
  else return;
  event.preventDefault();
  edited.cursor = true;
  paintMask();
});
for (const name of ["focus", "blur"]) {
  $("mask").addEventListener(name, () => {
    if (edited === null) return;
    edited.cursor = name === "focus" && $("mask").matches(":focus-visible");
    paintMask();
  });
}
$("again").addEventListener("click", fill);
$("forget").addEventListener("click", () => {
  history_ = [];
  localStorage.removeItem(HISTORY);
  list();
});
list();
introduce().catch((error) => say(error.message, true));
