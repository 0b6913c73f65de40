// What the player holds down: keys, buttons of the page, a gamepad. It is told as amounts of four directions, from
// which the model's action follows, and as actions of their own for number keys and buttons.

export const DIRECTIONS = ["up", "down", "left", "right"];
const KEYS = { w: "up", a: "left", s: "down", d: "right", ArrowUp: "up", ArrowLeft: "left", ArrowDown: "down", ArrowRight: "right" };
const OPPOSITE = { up: "down", down: "up", left: "right", right: "left" };
const DEAD_ZONE = 0.3; // of a gamepad's stick

export class Steering {
  held = new Map(); // source -> direction, or {action}
  stick = { x: 0, y: 0 };
  changedAt = 0; // when the last change was made, until a step carries it
  taps = []; // held so briefly that no step has seen them

  constructor(change) {
    this.change = change;
    addEventListener("blur", () => this.release());
    document.addEventListener("visibilitychange", () => document.hidden && this.release());
  }

  press(source, what, at) {
    if (this.held.has(source)) return;
    this.held.set(source, { what, at, isSeen: false });
    this.mark(at);
  }

  lift(source, at) {
    const held = this.held.get(source);
    if (!held) return;
    this.held.delete(source);
    if (!held.isSeen && at - held.at < 1000) this.taps.push(held.what);
    this.mark(at);
  }

  release() {
    if (this.held.size || this.stick.x || this.stick.y) {
      this.held.clear();
      this.stick = { x: 0, y: 0 };
      this.mark(performance.now());
    }
    this.taps = [];
  }

  mark(at) {
    this.changedAt ||= at;
    this.change();
  }

  // A key went down or up; true if it steers.
  key(event, isDown, numActions) {
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const number = /^[0-9]$/.test(name) && Number(name) < numActions ? { action: Number(name) } : null;
    const what = KEYS[name] ?? number;
    if (!what) return false;
    if (!isDown) this.lift(`key ${event.code}`, event.timeStamp);
    else if (!event.repeat) this.press(`key ${event.code}`, what, event.timeStamp);
    return true;
  }

  // Have a button of the page steer while it is held; a finger may slide from one to another.
  listen(pad) {
    const at = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-steer], [data-action]");
    const whatOf = (button) => button.dataset.steer?.split("-") ?? [{ action: Number(button.dataset.action) }];
    const sources = new Map(); // pointer -> sources held by it
    const set = (event, button) => {
      const wanted = button ? whatOf(button).map((what, index) => [`pointer ${event.pointerId} ${JSON.stringify(what)}`, what, index]) : [];
      for (const source of sources.get(event.pointerId) ?? []) if (!wanted.some(([name]) => name === source)) this.lift(source, event.timeStamp);
      for (const [name, what] of wanted) this.press(name, what, event.timeStamp);
      sources.set(event.pointerId, wanted.map(([name]) => name));
    };
    pad.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !at(event)) return;
      event.preventDefault();
      pad.setPointerCapture(event.pointerId);
      set(event, at(event));
    });
    pad.addEventListener("pointermove", (event) => sources.has(event.pointerId) && set(event, at(event)));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      pad.addEventListener(name, (event) => sources.has(event.pointerId) && (set(event, null), sources.delete(event.pointerId)));
    }
    pad.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  // Read the gamepads, which tell nothing by themselves.
  poll() {
    let x = 0;
    let y = 0;
    for (const pad of navigator.getGamepads?.() ?? []) {
      if (!pad) continue;
      const pressed = (index) => (pad.buttons[index]?.pressed ? 1 : 0);
      const axis = (index) => (Math.abs(pad.axes[index] ?? 0) > DEAD_ZONE ? pad.axes[index] : 0);
      x += axis(0) + pressed(15) - pressed(14);
      y += axis(1) + pressed(13) - pressed(12);
    }
    const limit = (value) => Math.max(-1, Math.min(1, Math.round(value * 10) / 10));
    if (limit(x) === this.stick.x && limit(y) === this.stick.y) return;
    this.stick = { x: limit(x), y: limit(y) };
    this.mark(performance.now());
  }

  // What is held now: {up, down, left, right} from 0 to 1, and a number of an action, or null.
  read() {
    const amounts = Object.fromEntries(DIRECTIONS.map((name) => [name, 0]));
    let action = null;
    const add = (what) => (typeof what === "string" ? (amounts[what] = 1) : (action = what.action));
    for (const held of this.held.values()) add(held.what);
    for (const what of this.taps) add(what);
    const { x, y } = this.stick;
    amounts[x < 0 ? "left" : "right"] ||= Math.abs(x);
    amounts[y < 0 ? "up" : "down"] ||= Math.abs(y);
    for (const name of DIRECTIONS) {
      const both = Math.min(amounts[name], amounts[OPPOSITE[name]]);
      amounts[name] -= both;
      amounts[OPPOSITE[name]] -= both;
    }
    return { amounts, action, isStill: action === null && DIRECTIONS.every((name) => !amounts[name]) };
  }

  // Note that a step carries what is held; the time of the change that it is the first to carry, or 0.
  taken() {
    for (const held of this.held.values()) held.isSeen = true;
    this.taps = [];
    const at = this.changedAt;
    this.changedAt = 0;
    return at;
  }
}

// The action, as the server takes it, of what is held; null where the model has none. `bindings` says what the
// directions stand for; where there is no action for two directions at once, they take turns with the steps.
export function actionOf({ amounts, action, isStill }, bindings, isVector, step) {
  if (action !== null) return String(action);
  if (isStill) return bindings.still;
  const directions = DIRECTIONS.filter((name) => amounts[name] > 0 && (!isVector || bindings[name]));
  if (isVector) {
    const vectors = directions.map((name) => bindings[name].split(",").map((value) => Number(value) * amounts[name]));
    const zeros = bindings.still.split(",").map(Number);
    return vectors.reduce((sum, vector) => sum.map((value, index) => value + vector[index]), zeros).join(",");
  }
  const strong = directions.filter((name) => amounts[name] > 0.4 || directions.length === 1);
  const both = strong.length === 2 ? bindings[strong.join("-")] : null;
  const single = strong.map((name) => bindings[name]).filter((value) => value !== null && value !== undefined);
  return both ?? (single.length ? single[step % single.length] : bindings.still);
}
