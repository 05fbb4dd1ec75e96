// The front page. What comes from a model, a program or a stranger becomes text, by textContent; the one piece of markup
// that is taken in is the server's own drawing of a run, through the only policy that the page's headers allow.
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const KEY = "asmodel.key";
const drawingPolicy = window.trustedTypes
  ? trustedTypes.createPolicy("drawing", { createHTML: (html) => html })
  : { createHTML: (html) => html };

let about = null;
let model = null;
let asking = null; // The AbortController of the request that is under way.
let timer = 0;
let shown = 0; // Which view is the newest: what was fetched for an older one comes too late.

// ---- small things ----

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = String(text);
  if (className) element.className = className;
  return element;
}
const say = (text) => { $("say").textContent = text; };
const show = (id, yes) => { $(id).hidden = !yes; };
function stored(value) {
  // A browser may forbid it; then the key lives as long as the page.
  try {
    if (value === undefined) return sessionStorage.getItem(KEY);
    if (value === null) sessionStorage.removeItem(KEY); else sessionStorage.setItem(KEY, value);
  } catch { /* nothing is kept */ }
  return value;
}
let key = stored() || "";

function seconds(s) {
  if (s === null || s === undefined) return "";
  if (s < 0.0995) return s < 0.0000995 ? "<0.1 ms" : s < 0.00995 ? `${(s * 1e3).toFixed(1)} ms` : `${Math.round(s * 1e3)} ms`;
  if (s < 99.5) return `${s.toFixed(2)} s`;
  const minutes = Math.floor(Math.round(s) / 60), rest = Math.round(s) % 60;
  return minutes < 60 ? `${minutes} min ${rest} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
function dollars(d) {
  if (d === null || d === undefined) return "unknown";
  if (d === 0) return "$0";
  return d >= 1 ? `$${d.toFixed(2)}` : d >= 0.000095 ? `$${d.toFixed(4)}` : `$${d.toExponential(0).replace(/e-(\d)$/, "e-0$1")}`;
}
const number = (n) => n === null || n === undefined ? "" : n.toLocaleString("en");
function plural(n, word) { return `${number(n)} ${word}${n === 1 ? "" : "s"}`; }
function began(unix) {
  const at = new Date(unix * 1000), now = new Date();
  const time = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
  return at.toDateString() === now.toDateString() ? time : `${at.toLocaleDateString()} ${time}`;
}

// ---- asking the server ----

class Refused extends Error {
  constructor(status, error) {
    super(error && error.message || `the server answered ${status}`);
    this.status = status;
    this.code = error && error.code || "";
  }
}
function headers(more) {
  const all = { ...more };
  // A header is bytes; a key is text in UTF-8.
  if (key) all.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(key));
  return all;
}
async function refusal(response) {
  let error = null;
  try { error = (await response.json()).error; } catch { /* no envelope: something in between has answered */ }
  return new Refused(response.status, error);
}
async function get(path) {
  const response = await fetch(path, { headers: headers({ Accept: "application/json" }), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// ---- what is served ----

const KINDS = [["preset", "Presets"], ["own", "Your programs"], ["program", "Programs"], ["upstream", "Upstreams"]];
const kindOf = (m) => m.kind === "program" && m.own ? "own" : m.kind;

function listModels() {
  const list = $("models");
  list.replaceChildren();
  for (const [kind, title] of KINDS) {
    const found = about.models.filter((m) => kindOf(m) === kind);
    if (!found.length) continue;
    list.append(make("h3", title));
    for (const m of found) {
      const label = make("label", null, "model");
      const input = make("input");
      input.type = "radio";
      input.name = "model";
      input.value = m.id;
      input.addEventListener("change", () => choose(m));
      label.append(input, make("b", m.id), make("span", summary(m)));
      list.append(label);
    }
  }
  const order = KINDS.flatMap(([kind]) => about.models.filter((m) => kindOf(m) === kind));
  const first = order.find((m) => kindOf(m) !== "program") && kindOf(order[0]) !== "program" && kindOf(order[0]) !== "upstream"
    ? order[0] : order.find((m) => m.kind === "program" && !(m.params && m.params.required)) || order[0];
  if (first) {
    list.querySelector(`input[value="${CSS.escape(first.id)}"]`).checked = true;
    choose(first);
  }
}
function summary(m) {
  if (m.description) return m.description;
  return m.kind === "upstream" ? `passed through to an upstream of kind ${m.upstream_kind || "?"}` : "";
}

function choose(m) {
  model = m;
  const box = $("about");
  const chips = make("ul", null, "chips");
  const chip = (text) => chips.append(make("li", text));
  if (m.kind === "preset") chip(`program: ${m.program}`);
  if (m.kind === "upstream") chip(`upstream: ${m.upstream_kind || "?"}`);
  for (const what of m.supports || []) chip(`takes ${what.replace("_", " ")}`);
  for (const name of m.settled || []) chip(`${name}: set by the server`);
  const heading = make("h3", m.id);
  box.replaceChildren(heading);
  if (summary(m)) box.append(make("p", summary(m)));
  if (chips.children.length) box.append(chips);
  askForParams();
  askForRoles();
}

// ---- parameters ----

function resolved(schema, root) {
  let found = schema || {};
  if (found.$ref) found = { ...(root.$defs || {})[found.$ref.split("/").pop()], ...found };
  if (found.allOf && found.allOf.length === 1) found = { ...resolved(found.allOf[0], root), ...found };
  const options = (found.anyOf || []).filter((option) => option.type !== "null");
  return found.anyOf && options.length === 1 ? { ...resolved(options[0], root), ...found, anyOf: undefined } : found;
}
function typeWords(s) {
  if (s.enum || s.const !== undefined || s.type === "boolean") return "";
  const least = s.minimum ?? s.exclusiveMinimum, most = s.maximum ?? s.exclusiveMaximum;
  const range = least !== undefined && most !== undefined ? `, ${s.exclusiveMinimum !== undefined ? "above " : ""}${least} to ${most}`
    : least !== undefined ? `, ${s.exclusiveMinimum !== undefined ? "above" : "at least"} ${least}` : most !== undefined ? `, at most ${most}` : "";
  if (s.type === "integer") return `whole number${range}`;
  if (s.type === "number") return `number${range}`;
  if (s.type === "string") return "text";
  if (isLines(s)) return "one a line";
  return "JSON";
}
const isLines = (s) => s.type === "array" && s.items && s.items.type === "string" && !s.items.enum;
const isChoice = (s) => s.type === "boolean" || s.enum;

function askForParams() {
  const root = model.params, box = $("params");
  box.replaceChildren();
  box.className = "grid";
  asJson(false);
  $("params-json").value = "{}";
  show("params-box", Boolean(root));
  if (!root) return;
  const names = Object.keys(root.properties || {});
  const required = new Set((root.required || []).filter((name) => !(model.settled || []).includes(name)));
  $("params-count").textContent = names.join(", ");
  $("params-box").open = required.size > 0;
  for (const [at, name] of names.entries()) {
    const s = resolved(root.properties[name], root), id = `param-${at}`;
    const field = make("div", null, "field");
    const label = make("label", `${name} `);
    label.htmlFor = id;
    const settled = (model.settled || []).includes(name);
    const standard = settled ? "as the server has it" : s.default === undefined || s.default === null ? "" : brief(s.default);
    const words = [typeWords(s), required.has(name) ? "required" : standard && !isChoice(s) && !isLines(s) ? `default ${standard}` : ""];
    if (words.some(Boolean)) label.append(make("i", `(${words.filter(Boolean).join(", ")})`));
    let input;
    if (isChoice(s)) {
      input = make("select");
      const unset = make("option", required.has(name) ? "choose" : standard ? `default: ${standard}` : "not set");
      unset.value = "";
      input.append(unset);
      for (const value of s.enum || [true, false]) {
        const option = make("option", brief(value));
        option.value = JSON.stringify(value);
        input.append(option);
      }
    } else if (s.type === "integer" || s.type === "number") {
      input = make("input");
      input.type = "number";
      input.step = s.type === "integer" ? "1" : "any";
      if (s.minimum !== undefined) input.min = s.minimum;
      if (s.maximum !== undefined) input.max = s.maximum;
    } else if (s.type === "string") {
      input = make(required.has(name) ? "textarea" : "input");
      if (required.has(name)) { input.rows = 3; field.classList.add("wide"); }
      input.dir = "auto";
    } else {
      input = make("textarea", null, isLines(s) ? "" : "mono");
      input.rows = isLines(s) ? 3 : 2;
      input.dir = isLines(s) ? "auto" : "ltr";
      field.classList.add("wide");
      if (isLines(s)) input.placeholder = settled ? standard : (s.default || []).join("\n");
    }
    input.id = id;
    input.required = required.has(name);
    input.dataset.param = name;
    input.autocomplete = "off";
    field.append(label, input);
    if (s.description) {
      const help = make("p", s.description, "help");
      help.id = `${id}-help`;
      input.setAttribute("aria-describedby", help.id);
      field.append(help);
    }
    box.append(field);
  }
}
function brief(value) {
  if (value === true) return "yes";
  if (value === false) return "no";
  return typeof value === "string" ? value : JSON.stringify(value);
}
const fields = () => [...$("params").querySelectorAll("[data-param]")];

function fieldParams() {
  const given = {};
  for (const input of fields()) {
    const name = input.dataset.param, text = input.value;
    if (text.trim() === "") continue;
    const s = resolved(model.params.properties[name], model.params);
    if (isChoice(s)) given[name] = JSON.parse(text);
    else if (s.type === "integer" || s.type === "number") given[name] = Number(text);
    else if (s.type === "string") given[name] = text;
    else if (isLines(s)) given[name] = text.split("\n").map((line) => line.trim()).filter(Boolean);
    else given[name] = parsed(text, name);
  }
  return given;
}
function parsed(text, what) {
  try { return JSON.parse(text); } catch (error) { throw new Error(`${what} is not JSON: ${error.message}`); }
}
function object(text, what) {
  if (!text.trim()) return {};
  const found = parsed(text, what);
  if (found === null || typeof found !== "object" || Array.isArray(found)) throw new Error(`${what} should be a JSON object`);
  return found;
}
const isJson = () => $("params-switch").getAttribute("aria-pressed") === "true";
const params = () => !model.params ? {} : isJson() ? object($("params-json").value, "The parameters") : fieldParams();

function asJson(yes) {
  $("params-switch").setAttribute("aria-pressed", String(yes));
  $("params-switch").textContent = yes ? "Back to the form" : "Write them as JSON";
  show("params", !yes);
  show("params-json-box", yes);
  // What is hidden is not to be complained about.
  for (const input of fields()) input.disabled = yes;
}
function switchParams() {
  try {
    if (!isJson()) {
      $("params-json").value = JSON.stringify(fieldParams(), null, 2);
      asJson(true);
      return;
    }
    const given = object($("params-json").value, "The parameters");
    for (const input of fields()) {
      const s = resolved(model.params.properties[input.dataset.param], model.params), value = given[input.dataset.param];
      input.value = value === undefined || value === null ? "" : isChoice(s) ? JSON.stringify(value)
        : isLines(s) && Array.isArray(value) ? value.join("\n") : typeof value === "object" ? JSON.stringify(value) : String(value);
    }
    asJson(false);
  } catch (error) {
    trouble(error.message);
  }
}

function askForRoles() {
  const box = $("roles"), roles = model.roles || [];
  box.replaceChildren();
  show("roles-box", roles.length > 0);
  $("roles-count").textContent = roles.map((r) => `${r.role}: ${r.player || "nobody"}`).join(", ");
  for (const [at, r] of roles.entries()) {
    const field = make("div", null, "field"), label = make("label", r.role), input = make("select");
    label.htmlFor = input.id = `role-${at}`;
    input.dataset.role = r.role;
    const unset = make("option", r.player ? `as set: ${r.player}` : "nobody plays it yet");
    unset.value = "";
    input.append(unset);
    const upstreams = about.models.filter((m) => m.kind === "upstream"), others = about.models.filter((m) => m.kind !== "upstream" && m.id !== model.id);
    for (const m of [...upstreams, ...others]) {
      const option = make("option", m.id);
      option.value = m.id;
      input.append(option);
    }
    field.append(label, input);
    box.append(field);
  }
}

// ---- one request ----

function trouble(text) {
  const box = $("trouble");
  box.textContent = text || "";
  box.hidden = !text;
}

function body() {
  const extension = {}, roles = {};
  const given = params();
  if (Object.keys(given).length) extension.params = given;
  for (const input of $("roles").querySelectorAll("select")) if (input.value) roles[input.dataset.role] = input.value;
  if (Object.keys(roles).length) extension.roles = roles;
  if ($("cache").value) extension.cache = $("cache").value;
  const rest = object($("rest").value, "The other fields");
  return {
    ...rest, model: model.id, messages: rest.messages || [{ role: "user", content: $("question").value }], stream: true,
    stream_options: { include_usage: true }, asmodel: { ...(rest.asmodel || {}), ...extension },
  };
}

const LINE = /^(.*) (\d+)\/(\d+)(?: \((.*)\))?$/u;

class Result {
  constructor() {
    this.began = performance.now();
    this.lines = new Map();
    this.answer = "";
    this.thoughts = "";
    this.pending = "";
    this.tools = [];
    this.receipt = null;
    this.usage = null;
    this.finish = null;
    this.drawn = false;
    $("progress").replaceChildren();
    $("cited").replaceChildren();
    $("thoughts").textContent = $("answer").textContent = $("failure").textContent = $("ids").textContent = "";
    for (const id of ["thinking", "failure", "citations", "data", "receipt", "ids"]) show(id, false);
    show("result", true);
    $("answer").classList.add("live");
    state("asking", "live");
  }

  chunk(chunk) {
    if (chunk.error) throw new Refused(200, chunk.error);
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.asmodel) this.receipt = chunk.asmodel;
    for (const choice of chunk.choices || []) {
      // Of several choices the first is shown; the run has them all.
      if (choice.index) continue;
      const delta = choice.delta || {};
      if (delta.reasoning_content) this.told(delta.reasoning_content);
      if (delta.content) {
        if (!this.answer) this.settle(-1);
        this.answer += delta.content;
        state("answering", "live");
      }
      if (delta.refusal) this.answer += delta.refusal;
      for (const call of delta.tool_calls || []) {
        const known = this.tools[call.index || 0] ||= { name: "", arguments: "" }, f = call.function || {};
        known.name += f.name || "";
        known.arguments += f.arguments || "";
      }
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
    this.draw();
  }

  // Once the answer has begun, nothing is told of the steps: those before the last one have led to it.
  settle(most) {
    for (const line of [...this.lines.values()].slice(0, most)) line.done = line.of;
  }

  told(text) {
    if (model.kind === "upstream") { this.thoughts += text; return; }
    const lines = (this.pending + text).split("\n");
    this.pending = lines.pop();
    for (const line of lines) {
      const [, what, done, of, notes] = LINE.exec(line) || [];
      if (what === undefined) this.thoughts += line + "\n";
      else this.lines.set(what, { done: Number(done), of: Number(of), notes });
    }
  }

  draw() {
    // Once a frame, however fast it comes.
    if (this.drawn) return;
    this.drawn = true;
    const draw = () => { this.drawn = false; this.drawNow(); };
    if (document.hidden) setTimeout(draw, 50); else requestAnimationFrame(draw);
  }

  drawNow() {
    const list = $("progress");
    for (const [at, [what, line]] of [...this.lines].entries()) {
      let item = list.children[at];
      if (!item) {
        item = make("li");
        const bar = make("progress");
        item.append(make("span", null, "what"), bar, make("span", null, "count"));
        list.append(item);
      }
      const [name, bar, count] = item.children;
      name.textContent = what;
      bar.max = Math.max(1, line.of);
      bar.value = line.done;
      bar.className = line.done >= line.of ? "whole" : "";
      bar.setAttribute("aria-label", what);
      count.textContent = `${line.done} of ${line.of}${line.notes ? `, ${line.notes}` : ""}`;
    }
    const thoughts = this.thoughts + (model.kind === "upstream" ? "" : this.pending);
    show("thinking", Boolean(thoughts.trim()));
    if ($("thoughts").textContent !== thoughts) $("thoughts").textContent = thoughts;
    const tools = this.tools.filter(Boolean).map((call) => `${call.name}(${call.arguments})`).join("\n");
    const said = this.answer + (tools ? `${this.answer ? "\n\n" : ""}calls ${tools}` : "");
    if ($("answer").textContent !== said) $("answer").textContent = said;
  }

  end(response, word, kind) {
    $("answer").classList.remove("live");
    state(word, kind);
    this.drawNow();
    const receipt = this.receipt || {}, header = (name) => response ? response.headers.get(name) : null;
    const tiles = [["time", seconds(receipt.seconds ?? (performance.now() - this.began) / 1000)]];
    if (this.receipt) {
      tiles.push(["steps", number(receipt.steps)], ["cached", number(receipt.cache_hits + receipt.joined)],
        ["calls", number(receipt.upstream_calls)]);
    } else if (header("x-asmodel-cache-hits") !== null && kind === "good") {
      tiles.push(["cached", header("x-asmodel-cache-hits")]);
    }
    if (this.usage) tiles.push(["tokens in", number(this.usage.prompt_tokens)], ["tokens out", number(this.usage.completion_tokens)]);
    if (this.receipt) tiles.push(["cost", dollars(receipt.cost)]);
    const list = $("receipt");
    list.replaceChildren(...tiles.map(([name, value]) => {
      const tile = make("div", null, "tile");
      tile.append(make("dt", name), make("dd", value));
      return tile;
    }));
    show("receipt", true);
    const trace = receipt.trace_id || header("x-asmodel-trace-id"), ids = $("ids");
    ids.replaceChildren();
    if (trace && about.runs_kept) ids.append(link(receipt.run_id || trace, "Open the run"));
    if (trace && about.jaeger) ids.append(jaeger(trace, "Open in Jaeger"));
    if (trace) ids.append("trace ", make("code", trace));
    if ((receipt.ignored || []).length) ids.append(`; ignored: ${receipt.ignored.join(", ")}`);
    show("ids", Boolean(trace));
    const cited = (receipt.citations || []).flat();
    $("cited").replaceChildren(...cited.map((c) => {
      const item = make("li");
      item.append(make("b", `${c.id}`), c.text ? ` ${c.text}` : "");
      return item;
    }));
    show("citations", cited.length > 0);
    show("data", receipt.data !== undefined && receipt.data !== null);
    $("datum").textContent = receipt.data === undefined ? "" : JSON.stringify(receipt.data, null, 2);
    return tiles.map(([name, value]) => `${name} ${value}`).join(", ");
  }

  fail(text) {
    $("failure").textContent = text;
    show("failure", true);
  }
}
function state(text, kind) {
  $("state").textContent = text;
  $("state").className = `badge ${kind}`;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data) yield data;
    }
  }
}

async function ask() {
  if (asking || !model) return;
  trouble("");
  let request;
  try { request = JSON.stringify(body()); } catch (error) { trouble(error.message); return; }
  const mine = asking = new AbortController();
  const result = new Result();
  let response = null, whole = false;
  show("stop", true);
  $("send").disabled = true;
  say("Asked.");
  if (innerWidth < 821) $("result").scrollIntoView({ block: "start" });
  soon();
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST", body: request, signal: mine.signal, headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
    });
    if (!response.ok) throw await refusal(response);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") { whole = true; break; }
      result.chunk(JSON.parse(data));
    }
    if (!whole) throw new Error("the answer broke off: the connection was lost");
    const how = result.finish && result.finish !== "stop" ? `done (${result.finish.replace("_", " ")})` : "done";
    result.settle();
    const told = result.end(response, how, result.finish === "length" ? "warn" : "good");
    say(`Answered. ${told}.`);
  } catch (error) {
    if (mine.signal.aborted) {
      result.end(response, "stopped", "warn");
      say("Stopped. Steps that were answered stay in the cache.");
    } else {
      if (error.status === 401) lock(error.message);
      result.end(response, "failed", "bad");
      result.fail(error.code ? `${error.message} (${error.code})` : error.message);
      say(`Failed: ${error.message}`);
    }
  } finally {
    asking = null;
    const back = document.activeElement === $("stop");
    show("stop", false);
    $("send").disabled = false;
    if (back) $("send").focus();
    soon();
  }
}
function stop() {
  if (asking) asking.abort();
}

// ---- the last runs ----

const OUTCOMES = { ok: "good", error: "bad", cancelled: "warn", running: "live", lost: "warn" };
const rows = new Map();

function link(id, text) {
  const a = make("a", text);
  a.href = `/runs/${encodeURIComponent(id)}`;
  a.dataset.go = a.getAttribute("href");
  return a;
}
function jaeger(trace, text) {
  const a = make("a", text);
  a.href = `${about.jaeger}/trace/${encodeURIComponent(trace)}`;
  a.target = "_blank";
  a.rel = "noopener noreferrer";
  return a;
}

function drawRuns(runs) {
  const body = $("runs");
  const seen = new Set();
  for (const [at, run] of runs.entries()) {
    const id = `${run.trace_id} ${run.span_id}`;
    seen.add(id);
    let row = rows.get(id);
    if (!row) {
      row = make("tr");
      const badge = make("td", null, "state"), name = make("td", null, "run"), when = make("td", null, "began");
      badge.append(make("span", null, "badge"));
      name.append(link(run.id, run.name));
      const time = make("time", began(run.started));
      time.dateTime = new Date(run.started * 1000).toISOString();
      when.append(time);
      row.append(badge, name, when);
      for (const what of ["", "steps", "cached", "calls", "tokens", ""]) {
        const cell = make("td", null, "n");
        cell.dataset.what = what;
        row.append(cell);
      }
      const more = make("td", null, "more");
      if (about.jaeger) {
        const a = jaeger(run.trace_id, "Jaeger");
        a.setAttribute("aria-label", `${run.name} in Jaeger`);
        more.append(a);
      }
      row.append(more);
      rows.set(id, row);
    }
    const [badge, , , ...cells] = row.children;
    const word = run.error ? `${run.outcome}: ${run.error}` : run.outcome;
    if (badge.firstChild.textContent !== word) {
      badge.firstChild.textContent = word;
      badge.firstChild.className = `badge ${OUTCOMES[run.outcome] || ""}`;
    }
    const told = [seconds(run.seconds), run.program ? number(run.steps) : "", run.hits ? number(run.hits) : "", number(run.calls),
      number(run.tokens), run.cost === null ? "unknown" : run.cost ? dollars(run.cost) : ""];
    cells[5].dataset.what = run.cost === null ? "cost" : "";
    told.forEach((text, n) => { if (cells[n].textContent !== text) cells[n].textContent = text; });
    if (body.children[at] !== row) body.insertBefore(row, body.children[at] || null);
  }
  for (const [id, row] of rows) {
    if (!seen.has(id)) { row.remove(); rows.delete(id); }
  }
  show("runs-box", runs.length > 0);
  show("no-runs", runs.length === 0);
}

// ---- views ----

function soon() {
  clearTimeout(timer);
  timer = setTimeout(refresh, 150);
}
async function refresh() {
  clearTimeout(timer);
  const view = shown;
  let pause = 3000;
  if (!document.hidden && about) {
    try {
      const path = location.pathname;
      if (path.startsWith("/runs/")) pause = await refreshRun(path.slice(6), view);
      else if (about.runs_kept) {
        const { runs } = await get("/front/runs");
        if (view !== shown) return;
        drawRuns(runs);
        $("runs-note").textContent = "";
        if (asking || runs.some((run) => run.outcome === "running")) pause = 1000;
      } else pause = 0;
    } catch (error) {
      if (view !== shown) return;
      if (error.status === 401) { lock(error.message); return; }
      $("runs-note").textContent = `not up to date: ${error.message}`;
      pause = 10000;
    }
  }
  if (view === shown && pause) { clearTimeout(timer); timer = setTimeout(refresh, pause); }
}

let drawn = "";
async function refreshRun(id, view) {
  let run;
  const asked = performance.now();
  try {
    run = await get(`/front/runs/${id}`);
  } catch (error) {
    if (error.status === 401) throw error;
    if (view !== shown) return 0;
    $("no-run").textContent = error.message;
    show("no-run", true);
    // It may be a moment until a run that has just begun is in the file.
    return error.status === 404 ? (performance.now() - opened < 5000 ? 500 : 0) : 5000;
  }
  if (view !== shown) return 0;
  show("no-run", false);
  document.title = `${run.title} - asmodel`;
  show("live", run.running);
  if (about.jaeger) $("run-jaeger").href = jaeger(run.trace_id).href;
  show("run-jaeger", Boolean(about.jaeger));
  if (run.html !== drawn) draw(run.html);
  // What is long to draw is drawn less often.
  return run.running ? Math.max(1000, 10 * (performance.now() - asked)) : 0;
}
let opened = 0;

function folds() {
  return [...$("drawing").querySelectorAll("details")];
}
function foldName(details, counts) {
  const summary = details.querySelector("summary .name, summary b") || details.querySelector("summary");
  const name = details.className + " " + (summary ? summary.textContent : "");
  const count = counts.get(name) || 0;
  counts.set(name, count + 1);
  return `${name} ${count}`;
}
function draw(html) {
  const first = !drawn, kept = new Map();
  let counts = new Map();
  for (const d of folds()) kept.set(foldName(d, counts), d.open);
  const active = $("drawing").contains(document.activeElement) ? document.activeElement : null;
  const at = active ? [...$("drawing").querySelectorAll("summary,a,button")].indexOf(active) : -1;
  const page = new DOMParser().parseFromString(drawingPolicy.createHTML(html), "text/html");
  $("drawing").replaceChildren(...page.body.childNodes);
  drawn = html;
  counts = new Map();
  for (const d of folds()) {
    const open = kept.get(foldName(d, counts));
    if (open !== undefined) d.open = open;
  }
  if (at >= 0) {
    const again = $("drawing").querySelectorAll("summary,a,button")[at];
    if (again) again.focus({ preventScroll: true });
  }
  if (first) {
    const heading = $("drawing").querySelector("h1");
    if (heading) { heading.tabIndex = -1; heading.focus({ preventScroll: true }); }
    reveal();
  }
}
function reveal() {
  const card = location.hash && document.getElementById(location.hash.slice(1));
  if (card && card.tagName === "DETAILS") {
    card.open = true;
    card.scrollIntoView({ block: "start" });
    card.querySelector("summary").focus({ preventScroll: true });
  }
}

function route(moved) {
  shown++;
  const isRun = location.pathname.startsWith("/runs/");
  show("lock", false);
  show("home", !isRun);
  show("run", isRun);
  if (isRun) {
    drawn = "";
    opened = performance.now();
    $("drawing").replaceChildren();
    show("live", false);
    show("no-run", false);
    show("run-jaeger", false);
  } else {
    document.title = "asmodel";
    if (moved) $("view").focus({ preventScroll: true });
  }
  if (moved && !location.hash) scrollTo(0, 0);
  refresh();
}
let here = location.pathname;
function go(path) {
  history.pushState(null, "", path);
  here = path;
  route(true);
}

function lock(message) {
  shown++;
  clearTimeout(timer);
  about = null;
  show("home", false);
  show("run", false);
  show("forget", false);
  show("lock", true);
  trouble(key && message ? message : "");
  $("key").value = "";
  $("key").focus();
}

async function begin() {
  try {
    about = await get("/front/about");
  } catch (error) {
    if (error.status === 401) lock(error.message);
    else {
      trouble(error.status ? error.message : "The server does not answer.");
      setTimeout(begin, 3000);
    }
    return;
  }
  trouble("");
  $("base").textContent = `${location.origin}/v1`;
  show("where", true);
  show("forget", about.keys);
  $("foot").textContent = `asmodel ${about.version}${about.caller ? `, as ${about.caller}` : ""}. `
    + (about.content ? "What is shown and said is recorded with the runs." : "What is shown and said is not recorded: of a run there are names, numbers and times.");
  show("foot", true);
  $("no-runs").textContent = about.runs_kept ? "Nothing has been asked yet." : "Runs are not kept: [traces] local is false.";
  show("no-runs", true);
  listModels();
  route(false);
}

// ---- what people do ----

document.addEventListener("click", (event) => {
  const a = event.target.closest("a[data-go]");
  if (a && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey && event.button === 0 && about) {
    event.preventDefault();
    go(a.dataset.go);
    return;
  }
  const fold = event.target.closest("#drawing button[data-of]");
  if (fold) for (const d of $("drawing").querySelectorAll(fold.dataset.of)) d.open = fold.dataset.open === "1";
  // A name in the timeline leads to its step, and does not fold the line that it stands in.
  const step = event.target.closest("#drawing .name a");
  if (step) { event.preventDefault(); history.replaceState(null, "", step.getAttribute("href")); reveal(); }
});
addEventListener("popstate", () => {
  if (!about) return;
  if (location.pathname === here) { reveal(); return; }
  here = location.pathname;
  route(true);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking) stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest && event.target.closest("#ask")) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && about) refresh(); });
$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("stop").addEventListener("click", stop);
$("params-switch").addEventListener("click", switchParams);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  stored(key);
  begin();
});
$("forget").addEventListener("click", () => {
  stop();
  key = "";
  stored(null);
  rows.clear();
  for (const id of ["runs", "drawing", "models", "about"]) $(id).replaceChildren();
  show("result", false);
  $("question").value = "";
  lock("");
});
begin();
})();
