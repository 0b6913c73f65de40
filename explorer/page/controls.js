// Controls of a model's options, built from what the server says of each: name, kind, limits, choices, default, help.

import { $ } from "./requests.js";

const STEPS = 100; // of a slider whose values are spaced by ratio

const titleOf = (option) => option.name.charAt(0).toUpperCase() + option.name.slice(1).replaceAll("_", " ");
const isNumber = (option) => option.kind === "number" || option.kind === "whole";
const isSlider = (option) => isNumber(option) && option.low !== null && option.high !== null;
// A range from a small part of one to several times one: each doubling gets the same room.
const isByRatio = (option) => option.kind === "number" && option.low > 0 && option.high / option.low >= 20;

// A round step by which the slider also reaches the default.
function stepOf(option) {
  if (option.kind === "whole") return 1;
  const span = option.high - option.low;
  for (let power = Math.floor(Math.log10(span)); power > -7; power--) {
    for (const digit of [5, 2, 1]) {
      const step = digit * 10 ** power;
      const offset = (option.default - option.low) / step;
      if (span / step >= 39.9 && Math.abs(offset - Math.round(offset)) < 1e-6) return Number(step.toPrecision(1));
    }
  }
  return "any";
}

const ratioOf = (option) => (option.high / option.low) ** (1 / STEPS);

function valueOf(option, slider) {
  if (!isByRatio(option)) return slider.value;
  const value = option.low * ratioOf(option) ** Number(slider.value);
  const isDefault = Math.abs(Math.log(value / option.default)) < 0.51 * Math.log(ratioOf(option));
  return String(isDefault ? option.default : Math.min(Number(value.toPrecision(2)), option.high));
}

function positionOf(option, value) {
  return isByRatio(option) ? Math.log(value / option.low) / Math.log(ratioOf(option)) : value;
}

const shown = (option, value) => (option.kind === "number" ? Number(value).toFixed(2) : value);

function element(name, values) {
  return Object.assign(document.createElement(name), values);
}

function input(option) {
  const common = { id: `option-${option.name}`, title: option.help };
  if (option.kind === "flag") return element("input", { ...common, type: "checkbox" });
  if (option.kind === "choice") {
    const select = element("select", common);
    select.append(...option.choices.map((choice) => new Option(choice)));
    return select;
  }
  if (!isSlider(option)) return element("input", { ...common, autocomplete: "off", spellcheck: false });
  const scale = isByRatio(option) ? { min: 0, max: STEPS, step: 1 } : { min: option.low, max: option.high, step: stepOf(option) };
  return element("input", { ...common, type: "range", ...scale });
}

function control(option, change) {
  const field = input(option);
  const label = element("label", { htmlFor: field.id, title: option.help });
  label.append(titleOf(option));
  if (option.kind === "flag") {
    field.onchange = () => change({ options: { [option.name]: String(field.checked) } });
    label.className = "inline";
    label.prepend(field);
    return [label];
  }
  if (isSlider(option)) {
    const output = element("output", { id: `option-${option.name}-value` });
    label.append(" ", output);
    field.oninput = () => (output.textContent = shown(option, valueOf(option, field)));
    field.onchange = () => change({ options: { [option.name]: valueOf(option, field) } });
  } else field.onchange = () => change({ options: { [option.name]: field.value.trim() } }, field);
  return [label, field];
}

// Make the controls; `change` takes new values.
export function buildControls(options, change) {
  $("options").hidden = !options.length;
  $("controls").replaceChildren(...options.flatMap((option) => control(option, change)));
}

// Have the controls show these values: name -> text.
export function showControls(options, values) {
  for (const option of options) {
    const field = $(`option-${option.name}`);
    const value = values[option.name];
    if (option.kind === "flag") field.checked = value === "true";
    else field.value = isSlider(option) ? positionOf(option, Number(value)) : value;
    if (isSlider(option)) $(`option-${option.name}-value`).textContent = shown(option, value);
  }
}

// The values of a model's options: those that are given, else those from before, else the defaults. Those from before
// may be of another model, and then be such that this one does not take them.
export function chooseOptions(options, given, before, isSameModel) {
  const suits = (option, value) => {
    if (value === undefined || isSameModel) return value !== undefined;
    if (option.kind === "text") return false;
    if (option.kind === "choice") return option.choices.map(String).includes(value);
    return !isSlider(option) || (Number(value) >= option.low && Number(value) <= option.high);
  };
  const value = (option) => given[option.name] ?? (suits(option, before[option.name]) ? before[option.name] : String(option.default ?? ""));
  return Object.fromEntries(options.map((option) => [option.name, value(option)]));
}
