// The explorer's page. The server is asked for blocks of frames, which are kept as pictures; drawing never waits.
//
// `state` is what the user has chosen, and stands in the address. Whether values make sense, the server decides. Each
// jump is a new `turn`: requests of earlier turns are aborted here and dropped there. What kinds of frames there are,
// and what options, the server says of each model.

import { buildControls, chooseOptions, showControls } from "./controls.js";
import { drawCells, timeOf } from "./drawing.js";
import { $, ask, askJson, hush, say, tab, unpack } from "./requests.js";
import { copyAddress, saveClip, savePicture } from "./saving.js";

const SPAN = 900; // frames that the timeline shows
const STORE_BYTES = 192e6; // of pictures, for each kind of frames
const VIDEO = ["model", "seed", "grid"]; // what decides, with the options, which pictures there are

const state = { model: "", seed: "0", frame: 0, view: "", grid: "1x1", fps: "30", pixels: "smooth", options: {} };
let about = null; // what the server says of the model
let end = Infinity; // where the video ends, once that is known
let endReason = "";
let progress = null; // of a rollout that is waited for
let numWaiting = 0; // requests for frames that are not answered yet
let playing = false;
let turn = 0;
let aborter = new AbortController();
let wake = () => {};

// ---------------------------------------------------------------------------
// Pictures that have come: for each kind, frame number -> ImageBitmap.

class Store {
  frames = new Map();

  get most() {
    const [rows, columns] = state.grid.split("x").map(Number);
    const size = about.kinds[this.kind];
    return Math.max(2 * size.block, Math.min(1800, Math.floor(STORE_BYTES / (4 * size.height * size.width * rows * columns))));
  }

  constructor(kind) {
    this.kind = kind;
  }

  add(frame, picture) {
    this.frames.get(frame)?.close();
    this.frames.set(frame, picture);
    while (this.frames.size > this.most) {
      let farthest = frame;
      for (const other of this.frames.keys()) {
        if (Math.abs(other - state.frame) > Math.abs(farthest - state.frame)) farthest = other;
      }
      this.frames.get(farthest).close();
      this.frames.delete(farthest);
    }
  }

  clear() {
    for (const picture of this.frames.values()) picture.close();
    this.frames.clear();
  }

  // The first frame that is missing, of those that are wanted soon.
  hole() {
    const ahead = playing ? Math.min(4 * Number(state.fps), Math.floor(this.most / 2)) : 1;
    for (let frame = state.frame; frame < Math.min(state.frame + ahead, end); frame++) {
      if (!this.frames.has(frame)) return frame;
    }
    return null;
  }
}

let stores = {};

const has = (kind) => Boolean(about && kind in about.kinds);
const single = () => Object.keys(about.kinds).filter((kind) => about.kinds[kind].shows.length === 1);
const shown = () => about.kinds[state.view].shows;
const stageOf = (kind) => about.kinds[kind].stage;
const nameOf = (kind) => about.kinds[kind].title;
// The frames of earlier stages are there sooner, and stand in for later ones as long as nothing plays.
const earlier = (kind) => single().filter((other) => stageOf(other) < stageOf(kind)).reverse();
const wanted = () => (playing ? shown() : single().filter((kind) => shown().some((one) => one === kind || stageOf(kind) < stageOf(one))));
const chosen = () => videoOf(state);

// The values for a request, without options that are left empty.
function videoOf({ model, seed, grid, options }) {
  return { model, seed, grid, ...Object.fromEntries(Object.entries(options).filter(([, value]) => value !== "")) };
}

// Go on from here: what was asked for before is wanted no more.
function restart() {
  aborter.abort();
  aborter = new AbortController();
  turn++;
  progress = null;
  if (about) for (const kind of wanted()) fill(kind, turn, aborter.signal);
  if (about && about.first !== null) watch(turn);
  poke();
}

// Have those that wait look again whether something is missing.
function poke() {
  const before = wake;
  wake = () => {};
  before();
}

// Have the page say how far a rollout is, if its frames do not come at once.
async function watch(mine) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 400));
    if (mine !== turn) return;
    const found = numWaiting ? await askJson("progress", { tab }).catch(() => null) : null;
    if (mine !== turn) return;
    dirty ||= found !== progress;
    progress = found;
  }
}

let isTroubled = false; // the server is out of reach, or has too much to do

async function fill(kind, mine, signal) {
  let numBlocks = 1;
  while (mine === turn) {
    const hole = stores[kind].hole();
    if (hole === null) {
      await new Promise((resolve) => {
        const before = wake;
        wake = () => (before(), resolve());
      });
      continue;
    }
    const { block, height, width } = about.kinds[kind];
    const [rows, columns] = state.grid.split("x").map(Number);
    const fits = Math.min(about.max_frames, Math.floor(about.max_bytes / (3 * height * width * rows * columns)), stores[kind].most / 2);
    const start = Math.floor(hole / block) * block;
    const count = Math.max(1, Math.min(numBlocks * block, Math.floor(fits)));
    const first = hole < start + count ? start : hole;
    const began = performance.now();
    try {
      const values = { ...chosen(), kind, start: first, count, tab, turn: mine };
      numWaiting++;
      const response = await ask("frames", values, { signal }).finally(() => numWaiting--);
      const found = await unpack(await response.arrayBuffer());
      if (mine !== turn) return found.forEach(([, picture]) => picture.close());
      for (const [frame, picture] of found) stores[kind].add(frame, picture);
      if (found.length < count) end = Math.min(end, first + found.length);
      dirty = true;
      if (isTroubled) hush();
      isTroubled = false;
    } catch (error) {
      if (mine !== turn || error.name === "AbortError" || error.status === 410) return;
      if (error.status === 400 && hole > state.frame) { // there is no more, but what is there can be played
        [end, endReason] = [Math.min(end, hole), error.message];
        continue;
      }
      say(error.message);
      if (error.status === 400) {
        playing = false;
        return showPlaying();
      }
      isTroubled = true;
      await new Promise((resolve) => setTimeout(resolve, 1500));
      continue;
    }
    const tookMs = performance.now() - began;
    numBlocks = tookMs < 300 ? Math.min(8, 2 * numBlocks) : tookMs > 1000 ? Math.max(1, numBlocks / 2) : numBlocks;
  }
}

// ---------------------------------------------------------------------------
// Drawing.

let dirty = true; // something changed since the last drawing
const clock = { began: 0, count: 0 }; // playing since, frames shown since
const times = []; // when the last frames were shown

function tick(now) {
  if (playing && about) advance(now);
  if (dirty && about) draw();
  while (times.length && times[0] < now - 2000) times.shift();
  const rate = times.length > 1 && playing ? ((times.length - 1) * 1000) / (now - times[0]) : 0;
  $("rate").textContent = playing ? `${rate.toFixed(1)} frames/s shown` : "";
  requestAnimationFrame(tick);
}

function advance(now) {
  const due = Math.floor(((now - clock.began) * Number(state.fps)) / 1000) - clock.count;
  let step = 0;
  if (state.frame + 1 >= end) return stop(), say(endReason || `The video ends at frame ${end}`, true);
  while (step < due && shown().every((kind) => stores[kind].frames.has(state.frame + step + 1))) step++;
  if (step < due || due > 5) Object.assign(clock, { began: now, count: 0 }); // late: go on from here, do not catch up
  else clock.count += step;
  if (due > 0) for (const kind of shown()) $(`figure-${kind}`).querySelector(".badge").classList.toggle("on", step === 0);
  if (step === 0) return;
  state.frame += step;
  times.push(now);
  dirty = true;
  poke();
  if (!(times.length % 30)) remember();
}

function draw() {
  dirty = false;
  for (const kind of single()) {
    const figure = $(`figure-${kind}`);
    figure.hidden = !shown().includes(kind);
    if (!figure.hidden) drawFigure(figure, kind);
  }
  drawTimeline();
}

function drawFigure(figure, kind) {
  const canvas = figure.querySelector("canvas");
  const badge = figure.querySelector(".badge");
  const [rows, columns] = state.grid.split("x").map(Number);
  const picture = stores[kind].frames.get(state.frame);
  const standIn = picture || earlier(kind).map((other) => stores[other].frames.get(state.frame)).find(Boolean);
  if (standIn || !("frame" in canvas.dataset)) { // until the new picture comes, the old one stays
    const height = about.kinds[kind].height * rows;
    const width = about.kinds[kind].width * columns;
    if (canvas.height !== height || canvas.width !== width) Object.assign(canvas, { height, width });
  }
  const { height, width } = canvas;
  if (standIn) canvas.getContext("2d").drawImage(standIn, 0, 0, width, height);
  canvas.dataset.frame = picture ? state.frame : "";
  const steps = progress && `computing frame ${progress.done.toLocaleString("en")} of ${progress.goal.toLocaleString("en")}`;
  badge.textContent = steps || (standIn && !picture ? "refining…" : "computing…");
  badge.classList.toggle("on", !picture);
  figure.querySelector("figcaption").textContent = `${nameOf(kind)}, ${about.kinds[kind].width} × ${about.kinds[kind].height}`;
  const box = figure.getBoundingClientRect();
  const room = document.fullscreenElement ? 0 : 32;
  const scale = Math.max(0.1, Math.min(box.width / width, (box.height - room) / height));
  const style = figure.querySelector(".picture").style;
  style.width = `${Math.floor(width * scale)}px`;
  style.height = `${Math.floor(height * scale)}px`;
  drawCells(figure.querySelector(".cells"), state, change);
}

function drawTimeline() {
  const first = Math.floor(state.frame / SPAN) * SPAN; // not before the first frame, which is 0 where there is one
  const last = Math.max(first, Math.min(first + SPAN, end) - 1);
  Object.assign($("scrub"), { min: first, max: last, value: state.frame });
  for (const button of document.querySelectorAll("[data-step]")) {
    button.disabled = Number(button.dataset.step) < 0 ? state.frame === about.first : state.frame + 1 >= end;
  }
  $("from").textContent = first.toLocaleString("en");
  $("to").textContent = last.toLocaleString("en");
  if (document.activeElement !== $("frame")) $("frame").value = state.frame;
  $("clock").textContent = timeOf(state.frame / Number(state.fps));
  const bar = $("loaded");
  bar.width = last - first + 1;
  const context = bar.getContext("2d");
  context.fillStyle = "#8a6a35";
  const kind = shown().at(-1);
  for (let index = 0; index < bar.width; index++) if (stores[kind].frames.has(first + index)) context.fillRect(index, 0, 1, 1);
}

// ---------------------------------------------------------------------------
// What the user does.

function play() {
  playing = true;
  times.length = 0;
  Object.assign(clock, { began: performance.now(), count: 0 });
  hush();
  showPlaying();
  restart();
}

function stop() {
  playing = false;
  showPlaying();
  remember();
  restartIfMissing();
}

function showPlaying() {
  document.body.classList.toggle("playing", playing);
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  dirty = true;
}

function restartIfMissing() {
  dirty = true;
  if (about && wanted().every((kind) => stores[kind].frames.has(state.frame))) poke();
  else restart();
}

function seek(frame) {
  if (about && about.first !== null) frame = Math.max(frame, about.first);
  state.frame = Math.min(frame, Math.max(end - 1, 0));
  Object.assign(clock, { began: performance.now(), count: 0 });
  restartIfMissing();
  remember();
}

// Take new values if the server finds them sensible, else say why not and stay. `field` is where they were typed. What
// is chosen while the server still thinks is added to it.
let changes = 0;
let pending = {};
const latest = () => ({ ...state, ...pending, options: { ...state.options, ...pending.options } });

async function change(values, field = null) {
  const mine = ++changes;
  pending = { ...pending, ...values, options: { ...pending.options, ...values.options } };
  const goal = latest();
  try {
    const opened = about?.model === goal.model ? about : await open(goal.model);
    const options = chooseOptions(opened.options, pending.options, state.options, opened === about);
    const kind = goal.view in opened.kinds ? goal.view : Object.keys(opened.kinds).findLast((one) => opened.kinds[one].shows.length === 1);
    const good = await askJson("check", { ...videoOf({ ...goal, options }), kind, frame: goal.frame });
    if (mine !== changes) return false;
    take(opened, good, "frame" in pending); // else it may have moved on
    pending = {};
  } catch (error) {
    if (mine !== changes) return false;
    pending = {};
    say(error.message);
    field?.classList.add("wrong");
    showState();
    return false;
  }
  for (const wrong of document.querySelectorAll(".wrong")) wrong.classList.remove("wrong");
  hush();
  showState();
  restart();
  remember();
  return true;
}

// Make what the server finds good the state.
function take(opened, good, withFrame) {
  const options = Object.fromEntries(Object.entries(good.options).map(([name, value]) => [name, String(value ?? "")]));
  const video = { model: good.model, seed: String(good.seed), grid: good.grid };
  const isOther = JSON.stringify([video, options]) !== JSON.stringify([Object.fromEntries(VIDEO.map((name) => [name, state[name]])), state.options]);
  if (opened !== about) build(opened);
  Object.assign(state, video, { options, view: good.kind });
  if (withFrame) state.frame = good.frame;
  if (!isOther) return;
  end = Infinity;
  endReason = "";
  for (const store of Object.values(stores)) store.clear();
}

// Make the parts of the page that depend on the model.
function build(opened) {
  for (const store of Object.values(stores)) store.clear();
  about = opened;
  stores = Object.fromEntries(single().map((kind) => [kind, new Store(kind)]));
  buildControls(about.options, change);
  const kinds = Object.keys(about.kinds);
  if ($("view").dataset.kinds === String(kinds)) return;
  $("view").dataset.kinds = kinds;
  $("view").hidden = kinds.length === 1;
  $("view").replaceChildren(...kinds.map((kind, index) => {
    const label = Object.assign(document.createElement("label"), { title: index + 1 });
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "view", value: kind, onchange: () => show(kind) });
    label.append(radio, Object.assign(document.createElement("span"), { textContent: nameOf(kind) }));
    return label;
  }));
  for (const figure of document.querySelectorAll("#stage figure")) figure.remove();
  $("stage").prepend(...single().map((kind) => {
    const figure = $("figure").content.firstElementChild.cloneNode(true);
    figure.id = `figure-${kind}`;
    figure.querySelector(".picture").onclick = () => state.grid === "1x1" && KEYS[" "]();
    return figure;
  }));
}

async function open(model) {
  const timer = setTimeout(() => say(`Opening ${model}…`, true), 400);
  try {
    return await askJson("model", { model });
  } finally {
    clearTimeout(timer);
  }
}

function showState() {
  for (const name of ["model", "seed", "grid", "fps"]) $(name).value = state[name];
  if (about) showControls(about.options, state.options);
  for (const name of ["view", "pixels"]) for (const radio of document.querySelectorAll(`[name=${name}]`)) radio.checked = radio.value === state[name];
  document.body.classList.toggle("sharp", state.pixels === "sharp");
  document.title = `${state.model}, seed ${state.seed} – Longtake explorer`;
  dirty = true;
}

// The address shows the same frame to all who open it.
function remember() {
  const { options, ...others } = state;
  if (about) history.replaceState(null, "", `#${new URLSearchParams({ ...others, ...options })}`);
}

// What the address says. Names that the page does not know are those of options.
function recall() {
  const { pixels, fps, ...values } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (pixels) state.pixels = pixels === "sharp" ? "sharp" : "smooth";
  if (fps) state.fps = [...$("fps").options].some((option) => option.value === fps) ? fps : "30";
  const known = Object.entries(values).filter(([name]) => name in state && name !== "options");
  const options = Object.entries(values).filter(([name]) => !(name in state));
  return { ...Object.fromEntries(known), options: Object.fromEntries(options) };
}

const nameOfPicture = () => `${state.model}_seed=${state.seed}_frame=${state.frame}_${shown().at(-1)}.png`;
const keepPicture = () => savePicture($(`figure-${shown().at(-1)}`).querySelector("canvas"), nameOfPicture());
const keepClip = () => saveClip({ ...chosen(), kind: state.view, fps: state.fps }, state.frame);
const copyLink = () => (remember(), copyAddress());
const randomSeed = () => change({ seed: String(Math.floor(Math.random() * 1e6)) });
const otherSeed = (step) => change({ seed: String(Number(latest().seed) + step) });
const togglePixels = () => (Object.assign(state, { pixels: state.pixels === "sharp" ? "smooth" : "sharp" }), showState(), remember());
const toggleGrid = () => change({ grid: latest().grid === "1x1" ? "3x3" : "1x1" });
const toggleFull = () => (document.fullscreenElement ? document.exitFullscreen() : $("stage").requestFullscreen());
const show = (view) => has(view) && change({ view });

const KEYS = {
  " ": () => (playing ? stop() : play()),
  ArrowLeft: (event) => seek(state.frame - (event.shiftKey ? 30 : 1)),
  ArrowRight: (event) => seek(state.frame + (event.shiftKey ? 30 : 1)),
  PageUp: () => seek(state.frame + SPAN),
  PageDown: () => seek(state.frame - SPAN),
  Home: () => seek(0),
  ArrowUp: () => otherSeed(1),
  ArrowDown: () => otherSeed(-1),
  e: () => $("seed").select(), f: () => $("frame").select(), r: randomSeed, g: toggleGrid,
  s: togglePixels, p: keepPicture, c: keepClip, l: copyLink, w: toggleFull,
  "?": () => $("help").showModal(),
};

function listen() {
  addEventListener("keydown", (event) => {
    const target = event.target;
    const isTyping = target.matches("input:not([type]), select") || $("help").open;
    const isMoving = target.matches("input:not(#scrub)") && event.key.startsWith("Arrow");
    const isPressing = target.matches("button") && event.key === " ";
    if (event.key === "Escape") return target.blur(), hush();
    const act = /^[1-9]$/.test(event.key) ? () => about && show(Object.keys(about.kinds)[event.key - 1]) : KEYS[event.key];
    if (isTyping || isMoving || isPressing || event.ctrlKey || event.metaKey || event.altKey || !act) return;
    event.preventDefault();
    act(event);
  });
  // After a click with the mouse the keys are for playing again.
  addEventListener("click", (event) => event.detail && event.target.closest("button, input:not(input:not([type]))")?.blur());
  const typed = (id, name) => ($(id).onchange = () => change({ [name]: $(id).value.trim() }, $(id)));
  typed("seed", "seed");
  typed("grid", "grid");
  $("frame").onchange = () => change({ frame: $("frame").value.replace(/[\s,]/g, "") }, $("frame"));
  typed("model", "model");
  addEventListener("keydown", (event) => event.key === "Enter" && event.target.matches("input:not([type])") && event.target.blur());
  for (const radio of document.querySelectorAll("[name=pixels]")) radio.onchange = togglePixels;
  for (const button of document.querySelectorAll("[data-step]")) button.onclick = () => seek(state.frame + Number(button.dataset.step));
  for (const button of document.querySelectorAll("[data-grid]")) button.onclick = () => change({ grid: button.dataset.grid });
  $("fps").onchange = () => (Object.assign(state, { fps: $("fps").value }), Object.assign(clock, { began: performance.now(), count: 0 }), (dirty = true), remember());
  $("scrub").oninput = () => seek(Number($("scrub").value));
  $("play").onclick = KEYS[" "];
  $("seed-up").onclick = () => otherSeed(1);
  $("seed-down").onclick = () => otherSeed(-1);
  $("seed-random").onclick = randomSeed;
  $("reset").onclick = () => change({ options: Object.fromEntries(about.options.map((option) => [option.name, String(option.default ?? "")])) });
  $("save-picture").onclick = keepPicture;
  $("save-clip").onclick = keepClip;
  $("full").onclick = toggleFull;
  $("link").onclick = copyLink;
  $("help-button").onclick = KEYS["?"];
  $("message").lastElementChild.onclick = hush;
  addEventListener("hashchange", () => change(recall()));
  addEventListener("pagehide", () => navigator.sendBeacon(`api/close?${new URLSearchParams({ tab })}`));
  new ResizeObserver(() => (dirty = true)).observe($("stage"));
}

async function begin() {
  listen();
  requestAnimationFrame(tick);
  try {
    const { models, formats } = await askJson("models");
    $("model").replaceChildren(...models.map((name) => new Option(name)));
    $("clip-format").replaceChildren(...formats.map((name) => new Option(name)));
    if (await change({ model: models[0], ...recall() })) return;
    const reason = $("message").firstElementChild.textContent; // the link is wrong: begin without it
    for (const model of models) { // the first may need what was not given
      if (await change({ model })) break;
    }
    say(reason);
  } catch (error) {
    say(error.message);
  }
}

begin();
