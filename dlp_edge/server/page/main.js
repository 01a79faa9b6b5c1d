// The page's state: what was said, who may answer, and the answer under way.

import { Refused, answer, key, models } from "./api.js";
import { colour, label } from "./tint.js";
import { Answer, Said, element } from "./transcript.js";

const find = (id) => document.getElementById(id);
const WISHES = ["auto", "pinned", "forbidden"];

let names = []; // of the skills
let wishes = {}; // skill -> what the user wants of it
let turns = []; // {said, answer}
let running = null; // AbortController

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  find("theme").textContent = theme === "dark" ? "Light" : "Dark";
  find("theme").setAttribute("aria-label", theme === "dark" ? "Light colours" : "Dark colours");
}

function showSkills() {
  find("skills").replaceChildren(...names.map((name) => {
    const item = element("li");
    const shown = element("button");
    shown.type = "button";
    const swatch = element("span", "swatch");
    swatch.style.background = colour(names, name);
    const wish = element("span", "wish");
    shown.append(swatch, element("span", "name", name), wish);
    const show = () => {
      item.dataset.wish = wishes[name];
      wish.textContent = wishes[name] === "auto" ? "" : wishes[name];
      shown.setAttribute("aria-label", `${name}: ${wishes[name]}`);
    };
    shown.addEventListener("click", () => {
      wishes[name] = WISHES[(WISHES.indexOf(wishes[name]) + 1) % WISHES.length];
      show();
    });
    show();
    item.append(shown);
    return item;
  }));
}

async function load() {
  try {
    const found = await models();
    find("model").replaceChildren(...found.map(({ id }) => new Option(id, id)));
    names = found.filter((model) => model.dlp_edge.adapter).map((model) => model.id);
    wishes = Object.fromEntries(names.map((name) => [name, "auto"]));
    showSkills();
  } catch (error) {
    await explain(error, load);
  }
}

// Asks for the key where that is what is missing; otherwise shows the error.
async function explain(error, again) {
  if (error instanceof Refused && error.status === 401) {
    const dialog = find("key-dialog");
    find("key-wrong").hidden = !key.get();
    find("key").value = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    key.set(find("key").value);
    await again();
    return;
  }
  const shown = new Answer(names);
  shown.fail(error instanceof Refused ? error.message : "The server cannot be reached.");
  find("log").append(shown.box);
}

function options() {
  const number = (id) => (find(id).value === "" ? undefined : Number(find(id).value));
  const pinned = names.filter((name) => wishes[name] === "pinned");
  const forbidden = names.filter((name) => wishes[name] === "forbidden");
  const own = { requests: find("requests").value, kv: find("kv").value };
  if (pinned.length) own.adapters = pinned;
  else if (forbidden.length) own.forbid = forbidden;
  return {
    model: find("model").value,
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    seed: number("seed"),
    max_tokens: number("max_tokens"),
    dlp_edge: own,
  };
}

function messages() {
  const system = find("system").value.trim();
  const said = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    said.push({ role: "user", content: turn.said.text });
    if (turn.answer?.text) said.push({ role: "assistant", content: turn.answer.text });
  }
  return said;
}

function setRunning(controller) {
  running = controller;
  find("send").hidden = controller !== null;
  find("stop").hidden = controller === null;
  find("log").setAttribute("aria-busy", String(controller !== null));
}

// Drops all turns from one on.
function cut(at) {
  for (const turn of turns.splice(at)) {
    turn.said.box.remove();
    turn.answer?.box.remove();
  }
}

async function ask(text) {
  running?.abort();
  const at = turns.length;
  const said = new Said(text, (changed) => {
    cut(at);
    ask(changed);
  });
  const turn = { said, answer: null };
  turns.push(turn);
  find("log").append(said.box);
  await respond(turn);
}

async function respond(turn) {
  const log = find("log");
  const body = { ...options(), messages: messages() };
  const shown = new Answer(names);
  turn.answer = shown;
  turn.said.box.after(shown.box);
  const controller = new AbortController();
  setRunning(controller);
  find("spoken").textContent = "Answering.";
  log.scrollTop = log.scrollHeight;
  const started = performance.now();
  try {
    for await (const document of answer(body, controller.signal)) {
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      const [choice] = document.choices;
      if (choice?.delta.content) shown.add(choice.delta.content, document.dlp_edge);
      if (choice?.finish_reason) shown.split(document.dlp_edge.requests);
      if (choice?.finish_reason) figures(document.dlp_edge.timings, choice.finish_reason);
      if (document.usage) {
        find("figures").textContent = `${document.usage.completion_tokens} tokens · ${find("figures").textContent}`;
      }
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      if (error instanceof Refused && error.status === 401) {
        shown.box.remove();
        turn.answer = null;
        setRunning(null);
        await explain(error, () => respond(turn));
        return;
      }
      shown.fail(error instanceof Refused ? error.message : "The connection to the server broke.");
    } else {
      find("figures").textContent = `stopped after ${((performance.now() - started) / 1000).toFixed(1)} s`;
    }
  }
  if (running === controller) setRunning(null);
  shown.end(() => {
    running?.abort();
    cut(turns.indexOf(turn) + 1);
    shown.box.remove();
    turn.answer = null;
    respond(turn);
  });
  log.scrollTop = log.scrollHeight;
  find("spoken").textContent = `${shown.text} Written by ${shown.fusions().map(label).join(", then ")}.`;
}

function figures(timings, finish) {
  const rate = timings.decode ? (timings.decode_steps + timings.accepted) / timings.decode : 0;
  const first = Math.round(timings.first_token * 1000);
  const end = finish === "length" ? " · cut at the limit" : "";
  find("figures").textContent = `${rate.toFixed(0)} tokens/s · first token after ${first} ms${end}`;
}

function fit() {
  const field = find("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function send(event) {
  event.preventDefault();
  const text = find("prompt").value;
  if (!text.trim() || running) return;
  find("prompt").value = "";
  fit();
  ask(text);
}

find("ask").addEventListener("submit", send);
find("prompt").addEventListener("input", fit);
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
find("settings").addEventListener("submit", (event) => event.preventDefault());
find("stop").addEventListener("click", () => {
  running?.abort();
  find("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
find("new").addEventListener("click", () => {
  running?.abort();
  cut(0);
  find("log").replaceChildren();
  find("prompt").focus();
});
find("options").addEventListener("click", () => {
  const settings = find("settings");
  settings.hidden = !settings.hidden;
  find("options").setAttribute("aria-expanded", String(!settings.hidden));
});
find("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("dlp-edge-theme", theme);
  setTheme(theme);
});
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
setTheme(localStorage.getItem("dlp-edge-theme") ?? (dark ? "dark" : "light"));
load();
