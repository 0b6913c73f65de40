// The page that steers: a world that answers keys, a step at a time.
//
// Steps are asked for while something is held, at most as many a second as chosen. A picture is drawn as soon as it
// comes. Looking back at earlier frames pauses the walk; the next key goes on from the frame that is seen.

import { buildControls, chooseOptions, showControls } from "./controls.js";
import { $, ask, askJson, hush, say, tab } from "./requests.js";
import { saveActions, savePicture, saveWalk } from "./saving.js";
import { Steering, actionOf } from "./steering.js";
import { Walking } from "./walking.js";

const NAMES = { up: "↑ W", down: "↓ S", left: "← A", right: "→ D", still: "no key" };

const state = { model: "", start: "", seed: "0", fps: "30", options: {} };
let about = null; // what the server says of the model
let bindings = {}; // direction -> action as text, or null
let file = null; // the start, if it is a file
let shown = -1; // frame in the canvas
let replaying = []; // actions that are still to be done
let isHalted = false; // something went wrong while a key was held
let isCutting = false;
let nextAt = 0; // when the next step is due
let marks = []; // key times whose pictures are not drawn yet
const times = []; // when the last frames were drawn

const steering = new Steering(() => (showPad(), pump()));
const walking = new Walking(take, fail);
const interval = () => 1000 / Number(state.fps);
const isVector = () => about.ranges.length > 0;

// ---------------------------------------------------------------------------
// Steps.

// Take the steps that are due; called whenever one may be.
function pump() {
  clearTimeout(pump.timer);
  if (!walking.number || isCutting || !about) return;
  const held = steering.read();
  if (held.isStill) isHalted = false;
  else if (replaying.length) stopReplay();
  const runs = replaying.length > 0 || !held.isStill || $("runs").checked;
  if (!runs || isHalted || document.hidden) return;
  if (shown < walking.frames - 1 && scrubbing !== null) return void goOnFrom(shown);
  const now = performance.now();
  if (now < nextAt - 1) return void (pump.timer = setTimeout(pump, nextAt - now));
  if (walking.underWay >= walking.depth(interval(), about.max_ahead) || queue.length > 1) return; // an answer calls again
  const action = replaying.length ? replaying.shift() : actionOf(held, bindings, isVector(), walking.base + walking.steps);
  if (!replaying.length) showReplay();
  if (action === null) return;
  const due = now - nextAt < interval() ? nextAt : now;
  nextAt = due + interval();
  $("hint").hidden = true;
  const at = steering.taken();
  walking.step(action, at);
  pump.timer = setTimeout(pump, Math.max(0, nextAt - now));
}

const queue = []; // frames of a longer step, which are drawn one after another: [frame, picture, at]

// A frame has come.
function take(frame, picture, at) {
  queue.push([frame, picture, at]);
  if (queue.length === 1 && scrubbing === null) drawNext();
  pump();
}

function drawNext() {
  const [frame, picture, at] = queue.shift();
  if (frame >= 0 && frame < shown) return;
  draw(frame, picture);
  if (at) walking.answered(at);
  if (frame < 0) return;
  times.push(performance.now());
  drawNext.last = times.at(-1);
}

function draw(frame, picture) {
  const canvas = $("world");
  if (picture) canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  else canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  canvas.dataset.frame = frame;
  shown = frame;
}

function fail(error) {
  isHalted = true;
  stopReplay();
  say(error.message);
}

// ---------------------------------------------------------------------------
// Looking back, and other ways.

let scrubbing = null; // frame that is looked at

async function look(frame) {
  scrubbing = frame;
  stopReplay();
  try {
    const picture = await walking.picture(frame);
    if (scrubbing === frame) draw(frame, picture);
  } catch (error) {
    say(error.message);
  }
}

// Have the walk go on from another place, to which `cut` brings it; return what that returns.
async function part(cut) {
  isCutting = true;
  let found = null;
  try {
    found = await cut();
    queue.length = 0;
    scrubbing = null;
    if (found && (walking.frames || walking.past)) draw(walking.frames - 1, await walking.picture(walking.frames - 1));
  } catch (error) {
    fail(error);
  } finally {
    isCutting = false;
  }
  showWays();
  pump();
  return found;
}

const goOnFrom = (frame) => part(() => walking.cut(frame + 1));

function undo() {
  stopReplay();
  const from = scrubbing ?? walking.frames - 1;
  if (walking.number && !isCutting && from >= 0) goOnFrom(Math.max(-1, from - Math.round(Number(state.fps))));
}

function showWays() {
  $("ways").hidden = !walking.ways.length;
  const title = ({ at, to }) => `frames ${at} to ${to - 1}`;
  $("ways").replaceChildren(new Option("Other ways", ""), ...walking.ways.map((way, index) => new Option(title(way), index)));
}

// Take a way again that was left.
async function takeWay(index) {
  stopReplay();
  if (isCutting || !walking.ways[index]) return;
  const actions = await part(() => walking.returnTo(index));
  if (actions) replay(actions);
}

function replay(actions) {
  replaying = [...actions];
  isHalted = false;
  showReplay();
  pump();
}

function stopReplay() {
  replaying = [];
  showReplay();
}

const showReplay = () => ($("stop-replay").hidden = !replaying.length);

async function replayFile(chosen) {
  if (!chosen) return;
  try {
    if (chosen.size > about.max_upload) throw new Error(`${chosen.name} is too large: use at most ${about.max_upload >> 20} MiB`);
    const response = await ask("play/actions", { model: state.model, name: chosen.name }, { method: "POST", body: chosen });
    const { actions } = await response.json();
    if (await begin()) replay(actions);
  } catch (error) {
    say(error.message);
  }
}

// ---------------------------------------------------------------------------
// Beginning.

// Begin the walk that is chosen.
async function begin() {
  stopReplay();
  [queue.length, times.length, scrubbing, shown, isHalted] = [0, 0, null, -1, false];
  Object.assign($("world"), { width: about.width, height: about.height });
  delete $("world").dataset.frame;
  const isReady = state.start !== "" && (state.start !== "upload" || file);
  $("drop").hidden = isReady;
  $("hint").hidden = !isReady;
  fit();
  remember();
  if (!isReady) return walking.leave(), false;
  try {
    const options = Object.fromEntries(Object.entries(state.options).filter(([, value]) => value !== ""));
    const values = { model: state.model, start: state.start, seed: state.seed, ...options };
    const isDone = await walking.begin(values, state.start === "upload" ? file : null);
    if (isDone) hush();
    showWays();
    return isDone;
  } catch (error) {
    say(error.message);
    return false;
  }
}

// Take what is chosen of the model, the start, the seed and the options; say why it is not possible, and stay.
async function choose(values) {
  try {
    const model = values.model ?? state.model;
    const found = about && model === about.model ? about : await open(model);
    const start = values.start ?? (found === about || found.starts.includes(state.start) ? state.start : (found.starts[0] ?? ""));
    const options = chooseOptions(found.options, values.options ?? {}, state.options, found === about);
    Object.assign(state, { model, options, start: start === "upload" || found.starts.includes(start) ? start : (found.starts[0] ?? "") });
    if (values.seed !== undefined) state.seed = values.seed;
    if (found !== about) build(found);
    showState();
    await begin();
    return true;
  } catch (error) {
    say(error.message);
    if (about) showState();
    return false;
  }
}

async function open(model) {
  const timer = setTimeout(() => say(`Opening ${model}…`, true), 400);
  try {
    return await askJson("play/model", { model });
  } finally {
    clearTimeout(timer);
  }
}

async function chooseFile(chosen) {
  if (!chosen || !about) return;
  if (!about.uploads) return say(`${state.model} begins from a seed alone`);
  if (chosen.size > about.max_upload) return say(`${chosen.name} is too large: use at most ${about.max_upload >> 20} MiB`);
  file = chosen;
  await choose({ start: "upload" });
}

function surprise() {
  const starts = about.starts;
  const start = starts.length ? starts[Math.floor(Math.random() * starts.length)] : state.start;
  choose({ start, seed: String(Math.floor(Math.random() * 1e6)) });
}

// ---------------------------------------------------------------------------
// The page.

// Make the parts that depend on the model.
function build(found) {
  about = found;
  bindings = { ...found.bindings };
  buildControls(found.options, (values) => choose(values));
  const ratio = `${found.width / found.height}`;
  $("starts").style.setProperty("--ratio", ratio);
  $("starts").replaceChildren(...found.starts.map((start) => {
    const label = Object.assign(document.createElement("label"), { title: start });
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "start", value: start, onchange: () => choose({ start }) });
    const address = `api/play/start?${new URLSearchParams({ model: found.model, start })}`;
    const picture = found.past
      ? Object.assign(document.createElement("img"), { src: address, alt: start, loading: "lazy" })
      : Object.assign(document.createElement("span"), { textContent: "Seed alone" });
    label.append(radio, picture);
    return label;
  }));
  $("upload-label").hidden = !found.uploads;
  const rate = [...$("fps").options].map((option) => Number(option.value)).filter((value) => value <= (found.fps ?? 30)).at(-1);
  state.fps = String(rate ?? 30);
  buildBindings();
  const bound = new Set(Object.values(found.bindings));
  const free = found.names.map((name, number) => [name, number]).filter(([, number]) => !bound.has(String(number)));
  $("others").replaceChildren(...free.slice(0, 12).map(([name, number]) => {
    const button = Object.assign(document.createElement("button"), { tabIndex: -1 });
    button.dataset.action = number;
    button.append(Object.assign(document.createElement("b"), { textContent: number }), name === String(number) ? "" : name);
    return button;
  }));
}

// Which action each direction stands for.
function buildBindings() {
  $("bindings").replaceChildren(...["up", "left", "down", "right", "still"].flatMap((direction) => {
    const label = Object.assign(document.createElement("label"), { textContent: NAMES[direction], htmlFor: `key-${direction}` });
    if (isVector()) {
      const field = Object.assign(document.createElement("input"), { id: label.htmlFor, value: bindings[direction] ?? "", autocomplete: "off" });
      field.title = "The numbers of the action, with commas between them";
      field.onchange = () => {
        const isGood = field.value.split(",").length === about.ranges.length && field.value.split(",").every((word) => word.trim() && isFinite(word));
        field.classList.toggle("wrong", !isGood && field.value.trim() !== "");
        if (isGood) bindings[direction] = field.value.replaceAll(" ", "");
        else if (!field.value.trim() && direction !== "still") bindings[direction] = null;
        showPad();
      };
      return [label, field];
    }
    const select = Object.assign(document.createElement("select"), { id: label.htmlFor });
    select.append(new Option("–", ""), ...about.names.map((name, number) => new Option(name === String(number) ? `action ${number}` : name, number)));
    select.value = bindings[direction] ?? "";
    select.onchange = () => ((bindings[direction] = select.value === "" ? null : select.value), showPad(), select.blur());
    return [label, select];
  }));
  showPad();
}

function showPad() {
  const { amounts, action } = steering.read();
  for (const button of document.querySelectorAll("#pad [data-steer]")) {
    const parts = button.dataset.steer.split("-");
    button.classList.toggle("on", parts.every((name) => amounts[name] > 0));
    button.classList.toggle("none", parts.every((name) => !bindings[name]));
  }
  for (const button of document.querySelectorAll("#others button")) button.classList.toggle("on", Number(button.dataset.action) === action && action !== null);
}

function showState() {
  for (const name of ["model", "seed", "fps"]) $(name).value = state[name];
  showControls(about.options, state.options);
  for (const radio of document.querySelectorAll("[name=start]")) radio.checked = radio.value === state.start;
  document.title = `${state.model} – Play – Longtake`;
}

function remember() {
  const { options, ...others } = state;
  history.replaceState(null, "", `#${new URLSearchParams({ ...others, ...options })}`);
}

function recall() {
  const { model, start, seed, fps, ...options } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (seed) state.seed = seed;
  return { model, start: start === "upload" ? undefined : start, fps, options };
}

// Make the picture as large as fits.
function fit() {
  if (!about) return;
  const box = $("stage").getBoundingClientRect();
  const isNarrow = getComputedStyle($("stage").parentElement).gridTemplateColumns.split(" ").length === 1;
  const room = document.fullscreenElement ? 0 : isNarrow ? 16 : 32;
  const height = isNarrow && !document.fullscreenElement ? innerHeight * 0.52 : box.height - room;
  const scale = Math.max(0.1, Math.min((box.width - room) / about.width, height / about.height));
  const style = document.querySelector(".screen").style;
  style.width = `${Math.floor(about.width * scale)}px`;
  style.height = `${Math.floor(about.height * scale)}px`;
}

function tick(now) {
  requestAnimationFrame(tick);
  steering.poll();
  if (queue.length && scrubbing === null && now - (drawNext.last ?? 0) >= interval() * 0.95) (drawNext(), pump());
  while (times.length && times[0] < now - 1000) times.shift();
  const rate = times.length > 4 ? ((times.length - 1) * 1000) / (times.at(-1) - times[0]) : 0;
  document.body.classList.toggle("still", !rate);
  if (rate) $("rate").textContent = `${rate.toFixed(rate < 10 ? 1 : 0)} frames/s`;
  if (walking.latency !== null) $("latency").textContent = `${Math.round(walking.latency)} ms key to picture`;
  if (!walking.number) [$("rate").textContent, $("latency").textContent] = ["", ""];
  $("place").textContent = walking.number && shown >= 0 ? `frame ${shown.toLocaleString("en")}` : "";
  Object.assign($("scrub"), { min: walking.past ? -1 : 0, max: Math.max(-1, walking.frames - 1) });
  if (scrubbing === null) $("scrub").value = shown;
  $("undo").disabled = isCutting || walking.frames === 0;
  $("save").disabled = walking.frames === 0 || isSaving;
  $("save-actions").disabled = walking.frames === 0;
  $("where").textContent = walking.frames ? `${((shown + 1) / Number(state.fps)).toFixed(1)} s of ${(walking.frames / Number(state.fps)).toFixed(1)} s` : "";
}

// Say how far the world has come again after a cut, while a step waits for that.
async function watch() {
  const found = walking.underWay && performance.now() - (drawNext.last ?? 0) > 300 ? await walking.progress() : null;
  $("badge").textContent = found ? `going back: frame ${found.done} of ${found.goal}` : "";
  $("badge").classList.toggle("on", Boolean(found));
  setTimeout(watch, 300);
}

let isSaving = false;

async function keep() {
  isSaving = true;
  await saveWalk(walking.number, state.fps);
  isSaving = false;
}

const keepPicture = () => savePicture($("world"), `${state.model}_seed=${state.seed}_frame=${shown}.png`);
const toggleFull = () => (document.fullscreenElement ? document.exitFullscreen() : $("stage").requestFullscreen());
const toggleRuns = () => (($("runs").checked = !$("runs").checked), pump());
const SHORTCUTS = { Backspace: undo, z: undo, r: () => begin(), n: surprise, f: toggleFull, p: keepPicture, t: toggleRuns, "?": () => $("help").showModal() };

function listen() {
  const isTyping = (target) => target.matches("input:not([type]), select") || $("help").open;
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") return event.target.blur(), hush();
    if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
    if (about && !(event.target.matches("input[type=range]:not(#scrub)") && event.key.startsWith("Arrow")) && steering.key(event, true, about.names.length)) return event.preventDefault();
    const act = SHORTCUTS[event.key];
    if (!act || event.repeat || !about) return;
    event.preventDefault();
    act();
  });
  addEventListener("keyup", (event) => about && steering.key(event, false, about.names.length));
  addEventListener("click", (event) => event.detail && event.target.closest("button, input:not(input:not([type]))")?.blur());
  addEventListener("keydown", (event) => event.key === "Enter" && event.target.matches("input:not([type])") && event.target.blur());
  for (const pad of [$("pad"), $("others")]) steering.listen(pad);
  $("scrub").oninput = () => look(Number($("scrub").value));
  $("model").onchange = () => choose({ model: $("model").value });
  $("seed").onchange = () => choose({ seed: $("seed").value.trim() || "0" });
  $("fps").onchange = () => ((state.fps = $("fps").value), remember(), $("fps").blur());
  $("runs").onchange = pump;
  for (const radio of document.querySelectorAll("[name=pixels]")) radio.onchange = () => document.body.classList.toggle("sharp", radio.value === "sharp");
  $("upload").onchange = () => (chooseFile($("upload").files[0]), ($("upload").value = ""));
  $("replay").onchange = () => (replayFile($("replay").files[0]), ($("replay").value = ""));
  for (const label of document.querySelectorAll("label.button")) label.onkeydown = (event) => event.key === "Enter" && label.querySelector("input").click();
  const onClick = { undo, again: () => begin(), any: surprise, save: keep, "save-actions": () => saveActions(walking.number), "save-picture": keepPicture, full: toggleFull, "stop-replay": stopReplay, "help-button": SHORTCUTS["?"] };
  for (const [id, act] of Object.entries(onClick)) $(id).onclick = act;
  $("ways").onchange = () => takeWay(Number($("ways").value));
  $("message").lastElementChild.onclick = hush;
  addEventListener("dragover", (event) => (event.preventDefault(), document.body.classList.add("over")));
  addEventListener("dragleave", () => document.body.classList.remove("over"));
  addEventListener("drop", (event) => (event.preventDefault(), document.body.classList.remove("over"), chooseFile(event.dataTransfer.files[0])));
  addEventListener("pagehide", () => navigator.sendBeacon(`api/close?${new URLSearchParams({ tab })}`));
  new ResizeObserver(fit).observe($("stage"));
  addEventListener("resize", fit);
}

async function main() {
  listen();
  requestAnimationFrame(tick);
  watch();
  try {
    const { models } = await askJson("models");
    $("model").replaceChildren(...models.map((name) => new Option(name)));
    const { model, fps, ...values } = recall();
    for (const name of model ? [model, ...models] : models) {
      if (!(await choose({ ...values, model: name }))) continue;
      if (fps && [...$("fps").options].some((option) => option.value === fps)) (state.fps = $("fps").value = fps), remember();
      return;
    }
  } catch (error) {
    say(error.message);
  }
}

main();
