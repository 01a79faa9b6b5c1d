// The conversation on the page. All text of others goes in as text, never as markup.

import { blend, label } from "./tint.js";

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function button(text, name, onClick) {
  const made = element("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", name);
  made.addEventListener("click", onClick);
  return made;
}

// What the user said, which can be edited.
export class Said {
  constructor(text, onEdit) {
    this.text = text;
    this.onEdit = onEdit;
    this.box = element("div", "turn");
    this.bubble = element("div", "said", text);
    this.bubble.prepend(element("span", "unseen", "You: "));
    this.actions = element("div", "actions");
    this.actions.append(button("Edit", `Edit: ${text.slice(0, 60)}`, () => this.edit()));
    this.box.append(this.bubble, this.actions);
  }

  edit() {
    const field = element("textarea");
    field.value = this.text;
    field.setAttribute("aria-label", "Edit the message");
    const close = () => {
      this.bubble.replaceChildren(element("span", "unseen", "You: "), this.text);
      this.actions.hidden = false;
    };
    const save = () => (field.value.trim() ? this.onEdit(field.value) : close());
    const row = element("div", "actions");
    row.append(button("Ask again", "Ask again with this text", save), button("Cancel", "Cancel", close));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        save();
      }
    });
    this.actions.hidden = true;
    this.bubble.replaceChildren(field, row);
    field.focus();
  }
}

// An answer, sentence by sentence.
export class Answer {
  constructor(names) {
    this.names = names;
    this.text = "";
    this.sentences = []; // {fusion, span}
    this.parts = []; // one a request
    this.box = element("div", "answer busy");
    this.box.append(element("span", "unseen", "Answer: "));
    this.body = element("div");
    this.box.append(this.body);
  }

  add(text, own) {
    this.text += text;
    const request = own.request ?? 0;
    if (!this.parts[request]) {
      this.parts[request] = element("p", "part");
      this.body.append(this.parts[request]);
    }
    let last = this.sentences.at(-1);
    if (!last || last.index !== own.sentence) {
      const span = element("span", "sentence");
      span.style.background = blend(this.names, own.fusion);
      span.title = label(own.fusion);
      last = { index: own.sentence, fusion: own.fusion, span };
      this.sentences.push(last);
      this.parts[request].append(span);
    }
    last.span.append(text);
  }

  // The requests that the prompt was split into, once they are known.
  split(requests) {
    if (requests.length < 2) return;
    requests.forEach((request, at) => {
      const leans = request.leans_on === null ? "" : `, after ${request.leans_on + 1}`;
      const caption = element("p", "caption", `${at + 1}${leans} · ${request.text.trim()}`);
      this.parts[at]?.before(caption);
    });
  }

  end(onRegenerate) {
    this.box.classList.remove("busy");
    for (const part of Object.values(this.parts)) {
      const span = part.lastElementChild;
      if (span) span.textContent = span.textContent.trimEnd();
    }
    const line = element("p", "fusions");
    this.fusions().forEach((fusion, at) => {
      if (at) line.append(" → ");
      const chip = element("span", "", label(fusion));
      chip.style.background = blend(this.names, fusion);
      line.append(chip);
    });
    const actions = element("div", "actions");
    const copy = () => navigator.clipboard?.writeText(this.text);
    actions.append(button("Copy", "Copy the answer", copy));
    actions.append(button("Regenerate", "Regenerate the answer", onRegenerate));
    this.box.append(line, actions);
  }

  // Which skills wrote it, one after another.
  fusions() {
    const found = [];
    for (const { fusion } of this.sentences) {
      if (!found.length || label(found.at(-1)) !== label(fusion)) found.push(fusion);
    }
    return found;
  }

  fail(message) {
    this.box.classList.remove("busy");
    const shown = element("p", "wrong", message);
    shown.setAttribute("role", "alert");
    this.box.append(shown);
  }
}
