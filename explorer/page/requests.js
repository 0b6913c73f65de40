// Requests to the server, and the message that says what went wrong.

export const $ = (id) => document.getElementById(id);
export const tab = Math.random().toString(36).slice(2) + Date.now().toString(36);

export class Complaint extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, values = {}, options = {}) {
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

export const askJson = async (...request) => (await ask(...request)).json();

export function say(text, isNote = false) {
  const message = $("message");
  message.firstElementChild.textContent = text.charAt(0).toUpperCase() + text.slice(1);
  message.classList.toggle("note", isNote);
  message.hidden = false;
  clearTimeout(say.timer);
  if (isNote) say.timer = setTimeout(() => (message.hidden = true), 2500);
}

export const hush = () => ($("message").hidden = true);

// The pictures of an answer, each as its number (64 bits), the size of its file (32 bits), and the file.
export async function unpack(buffer) {
  const data = new DataView(buffer);
  const waiting = [];
  for (let at = 0; at < buffer.byteLength; ) {
    const frame = Number(data.getBigInt64(at));
    const size = data.getUint32(at + 8);
    const file = new Blob([new Uint8Array(buffer, at + 12, size)], { type: "image/png" });
    waiting.push(createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).then((picture) => [frame, picture]));
    at += 12 + size;
  }
  return Promise.all(waiting);
}
