// One walk on the server: its steps, its pictures, and how long things take. Several steps may be under way at once,
// so that the way to a distant server costs no frames; there are only as many as that needs.

import { ask, askJson, tab, unpack } from "./requests.js";

const MAX_PICTURES = 600; // that are kept here; the server has all
const MAX_WAYS = 20;
const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1] ?? null;

export class Walking {
  number = 0; // of the walk, 0 before the first
  frames = 0;
  past = 0;
  actions = []; // of all steps
  ends = []; // number of frames after each step
  ways = []; // walks that were cut: where, how long they were, and all their actions
  pictures = new Map(); // frame -> ImageBitmap
  underWay = 0;
  turn = 0;
  steps = 0; // asked for in this turn
  base = 0; // steps before this turn
  network = 0; // ms of a step outside the model and the queue, on average
  model = 0; // ms of a step in the model
  latencies = [];

  // `show` is called with each new frame, its picture, and the time of the key that it answers, or 0.
  constructor(show, fail) {
    this.show = show;
    this.fail = fail;
  }

  get latency() {
    return median(this.latencies);
  }

  // Begin a walk in place of the one before; `file` is the start if that is a file.
  async begin(values, file = null) {
    this.leave();
    const mine = this.generation;
    const status = await (await ask("walks", { ...values, tab }, { method: "POST", body: file })).json();
    if (mine !== this.generation) return false;
    Object.assign(this, { number: status.walk, past: status.past, ways: [], latencies: [] });
    this.take(status);
    const first = this.past ? await this.picture(-1) : null;
    if (mine !== this.generation) return false;
    this.show(-1, first, 0);
    return true;
  }

  generation = 0; // of walks and cuts: what was asked for in an earlier one is not wanted

  leave() {
    this.generation++;
    this.number = 0;
    this.forget(-1);
    Object.assign(this, { underWay: 0, frames: 0, actions: [], ends: [] });
  }

  forget(first) {
    for (const [frame, picture] of this.pictures) if (frame >= first) (picture.close(), this.pictures.delete(frame));
  }

  take({ turn, frames }) {
    Object.assign(this, { turn, frames, steps: 0, underWay: 0, base: this.actions.length });
  }

  // How many steps should be under way: more than one only where the way to the server would leave it idle.
  depth(interval, most) {
    return Math.max(1, Math.min(most, 1 + Math.floor((this.model + this.network) / Math.max(this.model, interval, 1) - 0.2)));
  }

  // Take a step; `at` is when the key was pressed that it is the first to answer.
  async step(action, at) {
    const { generation, turn, number } = this;
    const began = performance.now();
    const index = this.base + this.steps; // answers may come in another order
    this.underWay++;
    try {
      const response = await ask(`walks/${number}/step`, { action, turn, step: this.steps++ }, { method: "POST" });
      const found = await unpack(await response.arrayBuffer());
      if (generation !== this.generation) return found.forEach(([, picture]) => picture.close());
      this.measure(response.headers.get("Server-Timing") ?? "", performance.now() - began);
      this.actions[index] = action;
      for (const [frame, picture] of found) {
        this.keep(frame, picture);
        this.frames = Math.max(this.frames, frame + 1);
      }
      this.ends[index] = found.at(-1)[0] + 1;
      this.underWay--;
      found.forEach(([frame, picture], index) => this.show(frame, picture, index ? 0 : at));
    } catch (error) {
      if (generation !== this.generation) return;
      this.generation++; // those behind it cannot go on
      this.underWay = 1; // none meanwhile
      if (error.status !== 410) this.fail(error);
      this.recover();
    }
  }

  // Ask where the walk is, after a step was lost.
  async recover() {
    const { number, generation } = this;
    try {
      const status = await askJson(`walks/${number}`);
      if (generation === this.generation) await this.cut(status.frames, false);
    } catch (error) {
      this.fail(error);
    }
  }

  measure(timing, took) {
    const of = (name) => Number(new RegExp(`${name};dur=([0-9.]+)`).exec(timing)?.[1] ?? 0);
    const smooth = (before, now) => (before ? 0.85 * before + 0.15 * now : now);
    this.model = smooth(this.model, of("model"));
    this.network = smooth(this.network, Math.max(0, took - of("model") - of("queue")));
  }

  keep(frame, picture) {
    this.pictures.get(frame)?.close();
    this.pictures.delete(frame);
    this.pictures.set(frame, picture);
    while (this.pictures.size > MAX_PICTURES) {
      const oldest = this.pictures.keys().next().value;
      this.pictures.get(oldest).close();
      this.pictures.delete(oldest);
    }
  }

  // The picture of a frame that was seen.
  async picture(frame) {
    if (this.pictures.has(frame)) return this.pictures.get(frame);
    const { number, generation } = this;
    const start = Math.max(this.past ? -1 : 0, frame - 7);
    const response = await ask(`walks/${number}/frames`, { start, count: frame < 0 ? 1 : 16 });
    const found = await unpack(await response.arrayBuffer());
    if (generation !== this.generation) return found.forEach(([, picture]) => picture.close());
    for (const [one, picture] of found) this.keep(one, picture);
    return this.pictures.get(frame);
  }

  // Go on after the first `count` frames; what comes after them is kept as a way of its own.
  async cut(count, keepsWay = true) {
    const mine = ++this.generation;
    const { number } = this;
    const status = await (await ask(`walks/${number}/cut`, { frame: count }, { method: "POST" })).json();
    if (mine !== this.generation) return false;
    const left = this.ends.filter((end) => end <= status.frames).length;
    if (keepsWay && this.actions.length > left) {
      this.ways.push({ at: status.frames, to: this.frames, actions: [...this.actions] });
      if (this.ways.length > MAX_WAYS) this.ways.shift();
    }
    this.actions.length = this.ends.length = left;
    this.forget(status.frames);
    this.take(status);
    return true;
  }

  // Go back to where a way that was left parts from the walk; return the actions from there on.
  async returnTo(index) {
    const [{ actions }] = this.ways.splice(index, 1);
    const parting = actions.findIndex((action, step) => action !== this.actions[step]);
    const common = parting < 0 ? actions.length : parting;
    return (await this.cut(common ? this.ends[common - 1] : 0)) ? actions.slice(common) : [];
  }

  answered(at) {
    this.latencies.push(performance.now() - at);
    if (this.latencies.length > 15) this.latencies.shift();
  }

  // How far the rollout has come again after a cut, null if it is there.
  progress() {
    return askJson("progress", { tab: `${tab}/play` }).catch(() => null);
  }
}
