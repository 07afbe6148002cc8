// The console: asks the four documents of the admin API once a second and shows what they say.
// Everything from outside becomes text nodes and classes from fixed tables, never markup.
"use strict";

const PERIOD_MS = 1000;
const PHASES = ["auth", "limit", "body", "queue", "pick", "connect", "upstream", "answer"];
const PHASE_TEXT = { upstream: "first byte", answer: "rest of the answer" };
const BREAKERS = { closed: ["closed", "good"], half_open: ["half open", "warn"], open: ["open", "bad"] };
const DISCOVERY = { watching: "good", static: "good", cold: "warn", stale: "bad" };

const at = (id) => document.getElementById(id);
const shown = {}; // id -> what stands there now, so that an unchanged table keeps its selection and scroll

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.map((child) => child instanceof Node ? child : String(child)));
  return made;
}

function titled(made, title) {
  made.title = title;
  return made;
}

function replace(id, source, make) {
  const key = JSON.stringify(source);
  if (shown[id] === key) return;
  shown[id] = key;
  at(id).replaceChildren(...make());
}

const cell = (className, ...children) => element("td", className, ...children);
const row = (...cells) => element("tr", "", ...cells);
const emptyRow = (columns, text) => {
  const only = cell("empty", text);
  only.colSpan = columns;
  return row(only);
};
const tag = (text, mood) => element("span", `tag ${mood}`, text);
const chip = (text, mood, title) => titled(element("li", `chip ${mood}`, text), title || "");
const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

function duration(ms) {
  if (ms === null || ms === undefined || Number.isNaN(ms)) return "–";
  if (ms >= 60000) return `${(ms / 60000).toFixed(1)} min`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms >= 10000 ? 1 : 2)} s`;
  return ms >= 100 ? `${ms.toFixed(0)} ms` : ms >= 1 ? `${ms.toFixed(1)} ms` : `${(ms * 1000).toFixed(0)} µs`;
}

function quantile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

const isBad = (request) => request.status >= 500 || (request.status < 400 && request.end_reason !== "ok");

// What stands at the top

function rate(requests) {
  // Of the last ten seconds, or of what the ring holds of them when it is full sooner.
  const now = Date.now() / 1000;
  const recent = requests.filter((request) => now - request.time < 10);
  const oldest = recent.length === requests.length && recent.length ? recent[recent.length - 1].time : now - 10;
  const full = requests.length >= 200 && recent.length === requests.length;
  return recent.length / (full ? Math.max(now - oldest, 0.001) : 10);
}

function figure(value, label, mood) {
  return element("div", `figure ${mood || ""}`, element("b", "", value), element("span", "", label));
}

function showFigures(requests, backends) {
  const good = requests.filter((request) => request.end_reason === "ok" && request.status < 400);
  const bad = requests.filter(isBad).length;
  const refused = requests.filter((request) => request.status >= 400 && request.status < 500).length;
  const totals = good.map((request) => request.total_ms);
  const firsts = good.filter((request) => request.stream && request.first_token_ms !== null).map((request) => request.first_token_ms);
  const overheads = good.map((request) => request.overhead_ms);
  const usable = backends.filter((backend) => backend.healthy && backend.state === "serving" && backend.breaker !== "open").length;
  const inflight = backends.reduce((sum, backend) => sum + backend.inflight, 0);
  const perSecond = rate(requests);
  at("figures").replaceChildren(
    figure(perSecond >= 10 ? perSecond.toFixed(0) : perSecond.toFixed(1), "requests / s"),
    figure(inflight, "in flight"),
    figure(`${usable} / ${backends.length}`, "backends usable", usable ? "" : "bad"),
    figure(bad, "failed of the last 200", bad ? "bad" : ""),
    figure(refused, "4xx of the last 200"),
    figure(duration(quantile(totals, 0.5)), "total, median"),
    figure(duration(quantile(firsts, 0.95)), "first token, p95"),
    figure(duration(quantile(overheads, 0.5)), "own time, median"),
  );
}

function showChips(policy, discovery) {
  const loaded = new Date(policy.loaded_at * 1000).toLocaleString();
  const heard = discovery.stale_seconds === null ? "never heard" : `heard ${duration(discovery.stale_seconds * 1000)} ago`;
  const state = discovery.state === "stale" ? `stale: ${heard}` : discovery.state;
  replace("chips", [policy.version, loaded, state, discovery.revision], () => [
    chip(`policy ${policy.version}`, "", `${policy.source}, in force since ${loaded}`),
    chip(`discovery ${state}`, DISCOVERY[discovery.state] || "warn", heard),
    chip(`revision ${discovery.revision}`, "", "newest change of the backends that is known"),
  ]);
}

function showProblem(text, lines) {
  at("problem").hidden = !text;
  if (!text) return;
  replace("problem", [text, lines], () => [element("strong", "", text), element("pre", "", lines.join("\n"))]);
}

// Tables

function stateOf(backend) {
  if (backend.state === "draining") return tag("draining", "warn");
  if (!backend.healthy) return tag("unhealthy", "bad");
  return backend.grpc_healthy === false ? tag("gRPC unhealthy", "bad") : tag("healthy", "good");
}

function loadOf(backend) {
  if (backend.reported_load === null || backend.reported_load === undefined) return element("span", "quiet", "not told");
  const share = Math.min(Math.max(backend.reported_load, 0), 1);
  const fill = element("i", "");
  fill.style.width = `${share * 100}%`;
  return titled(element("div", "meter", fill), `reported load ${backend.reported_load.toFixed(2)}`);
}

function modelNames(backend) {
  return backend.models.map((model) => typeof model === "string" ? model : model.version ? `${model.name} (${model.version})` : model.name).join(", ");
}

function showBackends(backends) {
  replace("backends", backends, () => backends.length ? backends.map((backend) => {
    const [breaker, mood] = BREAKERS[backend.breaker] || [backend.breaker, "warn"];
    return row(
      cell("name", backend.service),
      titled(cell("name", backend.id), backend.url || backend.id),
      titled(cell("name quiet", modelNames(backend)), modelNames(backend)),
      cell("", stateOf(backend)),
      cell("", tag(breaker, mood)),
      cell("number", backend.inflight),
      cell("", loadOf(backend)),
      cell("number quiet", backend.weight),
    );
  }) : [emptyRow(8, "Discovery knows no backend yet. `weir register` or `weir backend` brings one.")]);
}

function matchOf(match) {
  const parts = [match.path, match.model && `model ${match.model}`, ...Object.entries(match.header || {}).map(([name, value]) => `${name}: ${value}`)];
  return parts.filter(Boolean).join("  ·  ") || "everything";
}

function targetsOf(targets) {
  const total = targets.reduce((sum, target) => sum + target.weight, 0);
  return targets.map((target) => {
    const name = target.version ? `${target.service} ${target.version}` : target.service;
    return targets.length > 1 && total ? `${name} ${Math.round(100 * target.weight / total)}%` : name;
  }).join(", ");
}

function showRoutes(routes) {
  replace("routes", routes, () => routes.length ? routes.map((route) => row(
    cell("name", route.name),
    cell("wraps", element("code", "", matchOf(route.match))),
    cell("wraps quiet", route.allow.length ? route.allow.join(", ") : "everybody"),
    cell("wraps", targetsOf(route.to)),
    cell("quiet", route.balance.replaceAll("_", " ")),
  )) : [emptyRow(5, "The policy has no route: every request is answered with 404 no_route.")]);
}

function phasesOf(request) {
  const phases = { ...request.phases_ms };
  const before = Object.values(phases).reduce((sum, ms) => sum + ms, 0);
  phases.answer = Math.max(0, request.total_ms - before);
  return phases;
}

function bar(request, longest) {
  const phases = phasesOf(request);
  const parts = PHASES.filter((name) => phases[name] > 0);
  const text = parts.map((name) => `${PHASE_TEXT[name] || name} ${duration(phases[name])}`);
  const made = element("div", "bar", ...parts.map((name) => {
    const part = element("i", name);
    part.style.flexGrow = phases[name] / request.total_ms; // together 1: less would not fill the bar
    return part;
  }));
  made.style.width = `${100 * request.total_ms / longest}%`;
  return titled(made, text.join("\n"));
}

function statusOf(request) {
  const mood = isBad(request) ? "bad" : request.status >= 400 ? "warn" : "good";
  const why = request.end_reason === "ok" ? "" : ` ${request.code || request.end_reason}`;
  return titled(tag(`${request.status}${why}`, mood), [request.end_reason, request.rule].filter(Boolean).join(", "));
}

function backendOf(request) {
  if (!request.attempts.length) return cell("name quiet", "–");
  const last = request.attempts[request.attempts.length - 1];
  const more = request.attempts.length > 1 ? ` (${plural(request.attempts.length, "attempt")})` : "";
  const tried = request.attempts.map((attempt) => `${attempt.backend}: ${attempt.outcome} ${attempt.status || ""} ${duration(attempt.duration_ms)}`);
  return titled(cell("name", last.backend + more), tried.join("\n"));
}

function tokensOf(request) {
  if (request.tokens_in === null && request.tokens_out === null) return "–";
  return `${request.tokens_in ?? "?"} → ${request.tokens_out ?? "?"}`;
}

function showRequests(requests) {
  const chosen = at("failed").checked ? requests.filter((request) => request.status >= 400 || isBad(request)) : requests;
  const longest = Math.max(...chosen.map((request) => request.total_ms), 0.001);
  replace("requests", [at("failed").checked, chosen.map((request) => [request.request_id, request.time])], () => chosen.length ? chosen.map((request) => row(
    titled(cell("quiet", new Date(request.time * 1000).toLocaleTimeString()), `${request.method} ${request.path}\nrequest ${request.request_id}\ntrace ${request.trace_id}\npolicy ${request.policy}`),
    cell("", statusOf(request)),
    titled(cell("name", request.consumer || "–"), request.plan ? `plan ${request.plan}` : ""),
    cell("name", request.route),
    titled(cell("name", request.model || "–"), request.stream ? "streamed" : ""),
    backendOf(request),
    cell("number quiet", tokensOf(request)),
    cell("number", duration(request.total_ms)),
    cell("wide", bar(request, longest)),
  )) : [emptyRow(9, at("failed").checked ? "All of them ended well." : "No request yet.")]);
}

// The round

async function get(name) {
  const response = await fetch(`api/${name}`, { cache: "no-store" });
  if (!response.ok) throw new Error(`/api/${name} answered ${response.status}`);
  return response.json();
}

async function refresh() {
  const [{ backends, discovery }, { routes }, policy, { requests }] = await Promise.all(["backends", "routes", "policy", "requests"].map(get));
  showFigures(requests, backends);
  showChips(policy, discovery);
  showBackends(backends);
  showRoutes(routes);
  showRequests(requests);
  const error = policy.last_error;
  showProblem(
    error && `The policy of ${new Date(error.at * 1000).toLocaleTimeString()} was refused: ${plural(error.errors.length, "error")}. The one before it is in force.`,
    error ? error.errors : [],
  );
}

async function run() {
  try {
    if (!document.hidden) await refresh();
  } catch (error) {
    showProblem("The gateway does not answer; what stands below is its last word.", [error.message]);
  }
  setTimeout(run, PERIOD_MS);
}

at("legend").replaceChildren(...PHASES.map((name) => element("li", "", element("i", name), PHASE_TEXT[name] || name)));
at("failed").addEventListener("change", () => refresh().catch(() => undefined));
run();
