// The explorer's page. The server is asked for blocks of frames, which are kept as pictures; drawing never waits.
//
// `state` is what the user has chosen, and stands in the address. Whether values make sense, the server decides. Each
// jump is a new `turn`: requests of earlier turns are aborted here and dropped there.

const $ = (id) => document.getElementById(id);
const tab = Math.random().toString(36).slice(2) + Date.now().toString(36);
const SPAN = 900; // frames that the timeline shows
const STORE_BYTES = 192e6; // of pictures, for each kind of frames
const KINDS = ["lres", "sres"];
const VIDEO = ["model", "seed", "grid", "truncation", "speed"]; // what decides which pictures there are

const state = { model: "", seed: "0", frame: 0, view: "sres", grid: "1x1", truncation: "1", speed: "1", fps: "30", pixels: "smooth" };
let about = null; // what the server says of the model
let playing = false;
let turn = 0;
let aborter = new AbortController();
let wake = () => {};

// ---------------------------------------------------------------------------
// Talking to the server.

class Complaint extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, values = {}, options = {}) {
  let response;
  try {
    response = await fetch(`api/${path}?${new URLSearchParams(values)}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Complaint("The server does not answer: is it still running, and the tunnel to it?", 0);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: response.statusText }));
  throw new Complaint(error, response.status);
}

const askJson = async (...request) => (await ask(...request)).json();

function say(text, isNote = false) {
  const message = $("message");
  message.firstElementChild.textContent = text.charAt(0).toUpperCase() + text.slice(1);
  message.classList.toggle("note", isNote);
  message.hidden = false;
  clearTimeout(say.timer);
  if (isNote) say.timer = setTimeout(() => (message.hidden = true), 2500);
}

const hush = () => ($("message").hidden = true);

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
    for (let frame = state.frame; frame < state.frame + ahead; frame++) {
      if (!this.frames.has(frame)) return frame;
    }
    return null;
  }
}

const stores = Object.fromEntries(KINDS.map((kind) => [kind, new Store(kind)]));

const has = (kind) => Boolean(about && kind in about.kinds);
const shown = () => (state.view === "both" ? KINDS : [state.view]);
// Low resolution is there sooner, and stands in for the full size as long as nothing plays.
const wanted = () => (playing ? shown() : KINDS.filter((kind) => has(kind) && (kind === "lres" || state.view !== "lres")));
const chosen = () => Object.fromEntries(VIDEO.map((name) => [name, state[name]]));

// Go on from here: what was asked for before is wanted no more.
function restart() {
  aborter.abort();
  aborter = new AbortController();
  turn++;
  if (about) for (const kind of wanted()) fill(kind, turn, aborter.signal);
  poke();
}

// Have those that wait look again whether something is missing.
function poke() {
  const before = wake;
  wake = () => {};
  before();
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
      const response = await ask("frames", values, { signal });
      await unpack(await response.arrayBuffer(), kind, mine);
      if (isTroubled) hush();
      isTroubled = false;
    } catch (error) {
      if (mine !== turn || error.name === "AbortError" || error.status === 410) return;
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

// Each frame: its number (64 bits), the size of its file (32 bits), the file.
async function unpack(buffer, kind, mine) {
  const data = new DataView(buffer);
  const waiting = [];
  for (let at = 0; at < buffer.byteLength; ) {
    const frame = Number(data.getBigInt64(at));
    const size = data.getUint32(at + 8);
    const file = new Blob([new Uint8Array(buffer, at + 12, size)], { type: "image/png" });
    waiting.push(createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).then((picture) => [frame, picture]));
    at += 12 + size;
  }
  for (const [frame, picture] of await Promise.all(waiting)) {
    if (mine === turn) stores[kind].add(frame, picture);
    else picture.close();
  }
  dirty = true;
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
  for (const kind of KINDS) {
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
  const standIn = picture || stores.lres.frames.get(state.frame);
  if (standIn || !("frame" in canvas.dataset)) { // until the new picture comes, the old one stays
    const height = about.kinds[kind].height * rows;
    const width = about.kinds[kind].width * columns;
    if (canvas.height !== height || canvas.width !== width) Object.assign(canvas, { height, width });
  }
  const { height, width } = canvas;
  if (standIn) canvas.getContext("2d").drawImage(standIn, 0, 0, width, height);
  canvas.dataset.frame = picture ? state.frame : "";
  badge.textContent = standIn && !picture && kind === "sres" ? "sharpening…" : "computing…";
  badge.classList.toggle("on", !picture);
  const name = kind === "lres" ? "Low resolution" : "Full size";
  figure.querySelector("figcaption").textContent = `${name}, ${about.kinds[kind].width} × ${about.kinds[kind].height}`;
  const box = figure.getBoundingClientRect();
  const room = document.fullscreenElement ? 0 : 32;
  const scale = Math.max(0.1, Math.min(box.width / width, (box.height - room) / height));
  const style = figure.querySelector(".picture").style;
  style.width = `${Math.floor(width * scale)}px`;
  style.height = `${Math.floor(height * scale)}px`;
  drawCells(figure.querySelector(".cells"), rows, columns);
}

function drawCells(cells, rows, columns) {
  const key = `${state.seed} ${state.grid}`;
  if (cells.dataset.key === key) return;
  cells.dataset.key = key;
  cells.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  const seeds = rows * columns > 1 ? Array.from({ length: rows * columns }, (_, index) => Number(state.seed) + index) : [];
  cells.replaceChildren(
    ...seeds.map((seed) => {
      const button = document.createElement("button");
      button.textContent = seed;
      button.title = `See seed ${seed} alone`;
      button.onclick = (event) => (event.stopPropagation(), change({ seed: String(seed), grid: "1x1" }));
      return button;
    }),
  );
}

function drawTimeline() {
  const first = Math.floor(state.frame / SPAN) * SPAN;
  Object.assign($("scrub"), { min: first, max: first + SPAN - 1, value: state.frame });
  $("from").textContent = first.toLocaleString("en");
  $("to").textContent = (first + SPAN - 1).toLocaleString("en");
  if (document.activeElement !== $("frame")) $("frame").value = state.frame;
  $("clock").textContent = timeOf(state.frame / Number(state.fps));
  const bar = $("loaded");
  bar.width = SPAN;
  const context = bar.getContext("2d");
  context.fillStyle = "#8a6a35";
  const kind = shown().at(-1);
  for (let index = 0; index < SPAN; index++) if (stores[kind].frames.has(first + index)) context.fillRect(index, 0, 1, 1);
}

function timeOf(seconds) {
  const size = Math.abs(seconds);
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const hours = Math.floor(size / 3600);
  return `${seconds < 0 ? "−" : ""}${hours ? `${hours.toLocaleString("en")}:` : ""}${two((size / 60) % 60)}:${two(size % 60)}`;
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
  state.frame = frame;
  Object.assign(clock, { began: performance.now(), count: 0 });
  restartIfMissing();
  remember();
}

// Take new values if the server finds them sensible, else say why not and stay. `field` is where they were typed. What
// is chosen while the server still thinks is added to it.
let changes = 0;
let pending = {};
const latest = () => ({ ...state, ...pending });

async function change(values, field = null) {
  const mine = ++changes;
  pending = { ...pending, ...values };
  const { frame, view, ...goal } = latest();
  const video = Object.fromEntries(VIDEO.map((name) => [name, goal[name]]));
  try {
    const opened = about?.model === goal.model ? about : await open(goal.model);
    const kind = view in opened.kinds ? view : "lres";
    const good = await askJson("check", { ...video, kind, frame });
    if (mine !== changes) return false;
    for (const name of ["seed", "truncation", "speed"]) good[name] = String(good[name]);
    const isOther = !about || VIDEO.some((name) => good[name] !== state[name]);
    about = opened;
    for (const name of VIDEO) state[name] = good[name];
    if ("frame" in pending) state.frame = good.frame; // else it may have moved on
    state.view = kind;
    pending = {};
    if (isOther) for (const store of Object.values(stores)) store.clear();
  } catch (error) {
    if (mine !== changes) return false;
    pending = {};
    say(error.message);
    field?.classList.add("wrong");
    return false;
  }
  for (const wrong of document.querySelectorAll(".wrong")) wrong.classList.remove("wrong");
  hush();
  showState();
  restart();
  remember();
  return true;
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
  for (const name of ["model", "seed", "grid", "truncation", "speed", "fps"]) $(name).value = state[name];
  for (const name of ["truncation", "speed"]) $(`${name}-value`).textContent = Number(state[name]).toFixed(2);
  for (const name of ["view", "pixels"]) document.querySelector(`[name=${name}][value=${state[name]}]`).checked = true;
  for (const radio of document.querySelectorAll("[name=view]")) radio.disabled = !has(radio.value);
  document.body.classList.toggle("sharp", state.pixels === "sharp");
  document.title = `${state.model}, seed ${state.seed} – Longtake explorer`;
  dirty = true;
}

// The address shows the same frame to whoever opens it.
function remember() {
  if (about) history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

function recall() {
  const values = Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].filter(([name]) => name in state));
  if (values.pixels) state.pixels = values.pixels === "sharp" ? "sharp" : "smooth";
  if (values.fps) state.fps = [...$("fps").options].some((option) => option.value === values.fps) ? values.fps : "30";
  delete values.pixels;
  delete values.fps;
  if (values.view && !["lres", "sres", "both"].includes(values.view)) delete values.view;
  return values;
}

function save(url, name) {
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
}

function savePicture() {
  const canvas = $(`figure-${shown().at(-1)}`).querySelector("canvas");
  const name = `${state.model}_seed=${state.seed}_frame=${state.frame}_${shown().at(-1)}.png`;
  canvas.toBlob((blob) => {
    const url = URL.createObjectURL(blob);
    save(url, name);
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
}

async function saveClip() {
  const box = $("clip-progress");
  const start = $("clip-start").value.trim() || state.frame;
  const values = { ...chosen(), kind: state.view, start, count: $("clip-count").value, fps: state.fps, format: $("clip-format").value, tab };
  $("save-clip").disabled = true;
  try {
    const { clip } = await askJson("clips", values, { method: "POST" });
    hush();
    box.hidden = false;
    box.lastElementChild.onclick = () => ask(`clips/${clip}/cancel`, {}, { method: "POST" });
    for (;;) {
      const { name, done, frames, finished } = await askJson(`clips/${clip}`);
      box.firstElementChild.value = done / frames;
      box.children[1].textContent = `${done} of ${frames} frames`;
      if (finished) {
        save(`api/clips/${clip}/file`, name);
        say(`Saved ${name}`, true);
        break;
      }
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
  } catch (error) {
    if (error.status !== 410) say(error.message);
  } finally {
    box.hidden = true;
    $("save-clip").disabled = false;
  }
}

async function copyLink() {
  remember();
  try {
    await navigator.clipboard.writeText(location.href);
    say("Copied a link to this frame", true);
  } catch {
    say("The link to this frame is in the address bar", true);
  }
}

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
  1: () => show("lres"), 2: () => show("sres"), 3: () => show("both"),
  e: () => $("seed").select(), f: () => $("frame").select(), r: randomSeed, g: toggleGrid,
  s: togglePixels, p: savePicture, c: saveClip, l: copyLink, w: toggleFull,
  "?": () => $("help").showModal(),
};

function listen() {
  addEventListener("keydown", (event) => {
    const target = event.target;
    const isTyping = target.matches("input:not([type]), select") || $("help").open;
    const isMoving = target.matches("input:not(#scrub)") && event.key.startsWith("Arrow");
    const isPressing = target.matches("button") && event.key === " ";
    if (event.key === "Escape") return target.blur(), hush();
    if (isTyping || isMoving || isPressing || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key](event);
  });
  // After a click with the mouse the keys are for playing again.
  addEventListener("click", (event) => event.detail && event.target.closest("button, input:not(input:not([type]))")?.blur());
  const typed = (id, name) => ($(id).onchange = () => change({ [name]: $(id).value.trim() }, $(id)));
  typed("seed", "seed");
  typed("grid", "grid");
  $("frame").onchange = () => change({ frame: $("frame").value.replace(/[\s,]/g, "") }, $("frame"));
  typed("model", "model");
  for (const name of ["truncation", "speed"]) {
    $(name).oninput = () => ($(`${name}-value`).textContent = Number($(name).value).toFixed(2));
    $(name).onchange = () => change({ [name]: $(name).value });
  }
  for (const field of document.querySelectorAll("input:not([type])")) {
    field.addEventListener("keydown", (event) => event.key === "Enter" && field.blur());
  }
  for (const radio of document.querySelectorAll("[name=view]")) radio.onchange = () => show(radio.value);
  for (const radio of document.querySelectorAll("[name=pixels]")) radio.onchange = togglePixels;
  for (const button of document.querySelectorAll("[data-step]")) button.onclick = () => seek(state.frame + Number(button.dataset.step));
  for (const button of document.querySelectorAll("[data-grid]")) button.onclick = () => change({ grid: button.dataset.grid });
  $("fps").onchange = () => (Object.assign(state, { fps: $("fps").value }), Object.assign(clock, { began: performance.now(), count: 0 }), (dirty = true), remember());
  $("scrub").oninput = () => seek(Number($("scrub").value));
  $("play").onclick = KEYS[" "];
  for (const picture of document.querySelectorAll(".picture")) picture.onclick = () => state.grid === "1x1" && KEYS[" "]();
  $("seed-up").onclick = () => otherSeed(1);
  $("seed-down").onclick = () => otherSeed(-1);
  $("seed-random").onclick = randomSeed;
  $("reset").onclick = () => change({ truncation: "1", speed: "1" });
  $("save-picture").onclick = savePicture;
  $("save-clip").onclick = saveClip;
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
    await change({ model: models[0] });
    say(reason);
  } catch (error) {
    say(error.message);
  }
}

begin();
