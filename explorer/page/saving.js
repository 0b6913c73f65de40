// What is taken away from the page: pictures, clips, and the link to a frame.

import { $, ask, askJson, hush, say, tab } from "./requests.js";

function save(url, name) {
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
}

export function savePicture(canvas, name) {
  canvas.toBlob((blob) => {
    const url = URL.createObjectURL(blob);
    save(url, name);
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
}

// Have the server make a clip of the videos that `values` say, which begins at `frame` if nothing else is typed.
export async function saveClip(values, frame) {
  const range = { start: $("clip-start").value.trim() || frame, count: $("clip-count").value };
  $("save-clip").disabled = true;
  await fetchClip(() => askJson("clips", { ...values, ...range, format: $("clip-format").value, tab }, { method: "POST" }));
  $("save-clip").disabled = false;
}

// Have the server make a clip of a walk. Its actions are saved by a click of their own, for browsers hold back a second
// file that comes with one click.
export const saveWalk = (number, fps) => fetchClip(() => askJson(`walks/${number}/save`, { fps }, { method: "POST" }));
export const saveActions = (number) => save(`api/walks/${number}/actions`, "walk.actions.json");

// Wait for the clip that `start` has the server make, and save it.
async function fetchClip(start) {
  const box = $("clip-progress");
  try {
    const { clip } = await start();
    hush();
    box.hidden = false;
    box.lastElementChild.onclick = () => ask(`clips/${clip}/cancel`, {}, { method: "POST" });
    for (;;) {
      const { name, done, frames, finished, progress } = await askJson(`clips/${clip}`);
      box.firstElementChild.value = done / frames;
      box.children[1].textContent = progress ? `computing frame ${progress.done} of ${progress.goal}` : `${done} of ${frames} frames`;
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
  }
}

export async function copyAddress() {
  try {
    await navigator.clipboard.writeText(location.href);
    say("Copied a link to this frame", true);
  } catch {
    say("The link to this frame is in the address bar", true);
  }
}
