// Sends a text to the server this page is from, and shows the answer as it comes.
"use strict";

const at = (id) => document.getElementById(id);
const turns = [];  // of the chat: what has been said, both sides
let running = null;  // the AbortController of the request on its way

const mode = () => document.querySelector("input[name=mode]:checked").value;

// --- what is asked -------------------------------------------------------------------------------

function sampling() {
  const asked = {stream: true, stream_options: {include_usage: true}};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (at(name).value !== "") asked[name] = Number(at(name).value);
  }
  // as a person types it: \n is a line break
  if (at("stop_at").value !== "") asked.stop = at("stop_at").value.replaceAll("\\n", "\n");
  return asked;
}

async function ask(text) {
  const chat = mode() === "chat";
  if (chat) add("you", text, "");
  const answer = chat ? add("model", "", "") : add("", "", text);
  if (chat) turns.push({role: "user", content: text});
  const path = chat ? "/v1/chat/completions" : "/v1/completions";
  const body = sampling();
  if (chat) body.messages = turns; else body.prompt = text;
  await show(answer, path, body);
  const said = answer.querySelector(".said").textContent;
  if (chat && said) turns.push({role: "assistant", content: said});
  if (chat && !said) {  // it can be sent again
    turns.pop();
    at("prompt").value ||= text;
  }
}

// --- what comes ----------------------------------------------------------------------------------

async function show(article, path, body) {
  running = new AbortController();
  busy(true);
  article.classList.add("running");
  const said = article.querySelector(".said");
  const start = performance.now();
  let first = 0;
  try {
    for await (const event of events(path, body, running.signal)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const text = choice ? choice.text ?? choice.delta.content ?? "" : "";
      if (text) {
        first ||= performance.now();
        append(said, text);
      }
      if (event.usage) tell(event.usage.completion_tokens, start, first);
    }
  } catch (error) {
    if (error.name === "AbortError") at("speed").textContent = "stopped";
    else fail(article, error.message);
  } finally {
    article.classList.remove("running");
    running = null;
    busy(false);
  }
}

async function* events(path, body, signal) {
  const response = await fetch(path, {
    method: "POST", signal, body: JSON.stringify(body),
    headers: {"content-type": "application/json"},
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("the server has ended in the middle of the text");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

// --- what is seen --------------------------------------------------------------------------------

function add(who, text, given) {
  const article = document.createElement("article");
  article.className = who ? "turn" : "text";
  if (who) article.append(element("h3", "", who));
  const pre = document.createElement("pre");
  pre.append(element("span", "given", given), element("span", "said", text));
  article.append(pre);
  at("log").append(article);
  at("log").scrollTop = at("log").scrollHeight;
  return article;
}

function element(name, kind, text) {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = text;
  return made;
}

function append(said, text) {
  const log = at("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  said.append(text);
  if (follows) log.scrollTop = log.scrollHeight;
}

function fail(article, message) {
  article.append(element("p", "error", message));
  at("log").scrollTop = at("log").scrollHeight;
}

function tell(tokens, start, first) {
  const seconds = (performance.now() - (first || start)) / 1000;
  const rate = tokens > 1 ? `, then ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  const after = first ? `, the first after ${(first - start).toFixed(0)} ms` : "";
  at("speed").textContent = `${tokens} token${tokens === 1 ? "" : "s"}${after}${rate}`;
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  at("clear").disabled = yes;
  for (const choice of document.querySelectorAll("input[name=mode]")) choice.disabled = yes;
  if (yes) at("speed").textContent = "";
  if (yes) at("stop").focus(); else at("prompt").focus();
}

function setMode() {
  at("send").textContent = mode() === "chat" ? "Send" : "Continue";
  at("prompt").placeholder = mode() === "chat" ? "What is 2 + 3?" : "def fibonacci(n):";
  clear();
}

function clear() {
  turns.length = 0;
  at("log").replaceChildren();
  at("speed").textContent = "";
}

async function look() {
  const state = at("state");
  try {
    const health = await (await fetch("/health")).json();
    state.className = health.status === "ok" ? "" : "ill";
    state.textContent = health.status === "ok" ? "ready" : health.status;
  } catch {
    state.className = "ill";
    state.textContent = "the server does not answer";
  }
}

async function name() {
  const model = (await (await fetch("/v1/models")).json()).data[0].id;
  at("model").textContent = model;
  document.title = `${model} - dist_lab`;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value;
  if (running || !text || !at("settings").reportValidity()) return;
  if (mode() === "chat") at("prompt").value = "";
  ask(text);
});
at("prompt").addEventListener("keydown", (event) => {
  const sends = mode() === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && sends && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", clear);
at("settings").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["temperature", "top_p"]) {
  at(id).addEventListener("input", () => { at(`shown-${id}`).textContent = at(id).value; });
}
for (const choice of document.querySelectorAll("input[name=mode]")) {
  choice.addEventListener("change", setMode);
}
name().catch(() => {});
look();
setInterval(look, 5000);
