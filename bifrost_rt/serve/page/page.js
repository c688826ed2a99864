// The page: one job at a time, seen becoming, a history of how pictures were made, and questions
// about an image, whose answers come word by word.
// Requests carry a token where the server asks for one, so pictures and events come by fetch.
"use strict";

const $ = (id) => document.getElementById(id);
const HISTORY = "bifrost-rt history";
const KEPT = 24;
const NAMES = {
  seed: "Seed", num_inference_steps: "Denoising steps", decoding_steps: "Decoding steps",
  controlnet_conditioning_scale: "Weight of the latents", cfg_weight: "Guidance of the MLLM",
  guidance_scale: "Embedded guidance", num_images_per_prompt: "Pictures",
};
let about = null;
let running = null;   // the job's id
let shown = null;     // the entry of the history that is on the page
let asked = null;     // the image that is asked about
let asking = null;    // ends the answer that is on its way
const blobs = new Map(); // entry -> pictures, as long as the page is open

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const token = $("token").value.trim();
  if (token) headers.Authorization = `Bearer ${token}`;
  if (options.body) headers["Content-Type"] = "application/json";
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
  for (const input of document.querySelectorAll("#options input")) {
    if (input.value !== "" && !input.parentElement.hidden) body[input.name] = Number(input.value);
  }
  return body;
}

async function draw() {
  if (running !== null || !$("form").reportValidity()) return;
  running = "";
  busy(true);
  say("Asking …");
  try {
    if (about === null) await introduce();
    const body = JSON.stringify(requested());
    const job = await (await call("/v1/jobs", { method: "POST", body })).json();
    running = job.id;
    for await (const [name, data] of events(`/v1/jobs/${job.id}/events`)) {
      if (name === "preview") preview(data);
      else if (name === "progress") progress(data);
      else await finish(name, data);
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
  let image = $("pictures").querySelector("img.preview");
  if (!image) {
    image = Object.assign(new Image(), { className: "preview", alt: "preview" });
    $("pictures").replaceChildren(image);
    $("facts").replaceChildren();
    $("again").hidden = true;
  }
  image.src = `data:image/webp;base64,${data.webp}`;
  image.dataset.step = data.step;
}

async function finish(state, job) {
  if (state !== "done") {
    $("pictures").replaceChildren();
    say(state === "cancelled" ? "Cancelled." : job.error.message, state === "failed");
    return;
  }
  const pictures = [];
  for (const path of job.images) pictures.push(await (await call(path)).blob());
  const entry = { parameters: job.parameters, thumb: await thumbnail(pictures[0]) };
  blobs.set(entry, pictures);
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
  const pictures = blobs.get(entry) ?? [];
  for (const image of $("pictures").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("pictures").replaceChildren(...pictures.map((blob, i) => {
    const url = URL.createObjectURL(blob);
    const link = Object.assign(document.createElement("a"), {
      className: "download", href: url, textContent: "Download",
      download: `bifrost-${facts.seed}${pictures.length > 1 ? `-${i}` : ""}.png`,
    });
    const caption = document.createElement("figcaption");
    caption.append(link);
    if (about !== null && canAsk()) {
      const ask = Object.assign(document.createElement("button"), { type: "button", textContent: "Ask about it" });
      ask.addEventListener("click", () => { take(blob); $("question").focus(); });
      caption.append(ask);
    }
    const figure = document.createElement("figure");
    figure.append(Object.assign(new Image(), { src: url, alt: prompt }), caption);
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
  for (const input of document.querySelectorAll("#options input")) {
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
  for (const old of history_.splice(KEPT - 1)) blobs.delete(old);
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
      say("Only how it was made is kept. Its settings are filled in: Draw makes the same picture.");
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
  document.querySelector("[name=n]").max = about.max_images;
  document.querySelector("[name=num_inference_steps]").max = about.max_steps;
  $("prompt").maxLength = about.max_prompt;
  $("asking").hidden = !canAsk();
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
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    const file = event.dataTransfer.files[0];
    if (name === "drop" && file) take(file);
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
