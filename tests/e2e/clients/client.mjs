// The official Node SDK under remote control: reads one request a line, does it, writes one line of what it saw.
//
// The same orders and the same answers as client.py, so that one test asks both.

import dns from "node:dns";
import { createInterface } from "node:readline";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { VERSION } from "openai/version";
import { z } from "zod";

const SCHEMAS = { Sum: z.object({ what: z.string(), total: z.number().int() }) };
const TOOL = {
  type: "function",
  function: {
    name: "add",
    description: "The sum of two numbers.",
    strict: true,
    parameters: {
      type: "object",
      properties: { a: { type: "integer" }, b: { type: "integer" } },
      required: ["a", "b"],
      additionalProperties: false,
    },
  },
};

// As a name server might answer that is up to no good: a foreign name, and the address of this machine.
const { lookup } = dns;
dns.lookup = (host, ...rest) => lookup(host === "models.example" ? "127.0.0.1" : host, ...rest);

// CLOCK_MONOTONIC, which is the clock of the tests too.
const now = () => Number(process.hrtime.bigint()) / 1e9;

// What Python's SDK takes among the parameters of a call, Node's takes in part beside them.
const split = ({ extra_headers: headers, extra_body: extra, ...ask }) => [{ ...ask, ...extra }, { headers }];

const headersOf = (headers) => Object.fromEntries(headers ? [...headers.entries()] : []);

function failure(error) {
  const classes = [];
  for (let c = error.constructor; c && c.name; c = Object.getPrototypeOf(c)) classes.push(c.name);
  const told = { class: classes[0], classes, message: error.message };
  if (error instanceof OpenAI.APIError) {
    const { status, code, param, type, error: body, requestID } = error;
    Object.assign(told, { status, code, param, type, body, headers: headersOf(error.headers), request_id: requestID });
  }
  return told;
}

// The parameters of an answer that the SDK added itself are not on the wire.
const wire = (value) => JSON.parse(JSON.stringify(value));

const WAYS = {
  async create(client, { ask }) {
    const completion = await client.chat.completions.create(...split(ask));
    return { completion: wire(completion), request_id: completion._request_id };
  },

  async raw(client, { ask }) {
    const { data, response } = await client.chat.completions.create(...split(ask)).withResponse();
    return { completion: wire(data), headers: headersOf(response.headers), request_id: data._request_id };
  },

  async stream(client, { ask, leave_after: leave }) {
    const chunks = [];
    const result = { chunks, at: [] };
    const [body, options] = split(ask);
    const { data, response } = await client.chat.completions.create({ ...body, stream: true }, options).withResponse();
    result.headers = headersOf(response.headers);
    try {
      for await (const chunk of data) {
        chunks.push(wire(chunk));
        result.at.push(now());
        const said = chunks.filter((c) => c.choices[0]?.delta.content).length;
        if (leave !== undefined && said >= leave) {
          result.left_at = now();
          data.controller.abort();
          break;
        }
      }
    } catch (error) {
      result.error = failure(error);
    }
    return result;
  },

  async parse(client, { ask, schema }) {
    const [body, options] = split(ask);
    const response_format = zodResponseFormat(SCHEMAS[schema], schema);
    const completion = await client.chat.completions.parse({ ...body, response_format }, options);
    return { parsed: completion.choices[0].message.parsed, completion: wire(completion) };
  },

  async accumulate(client, { ask, schema, tools }) {
    const [body, options] = split(ask);
    const more = {
      ...(schema ? { response_format: zodResponseFormat(SCHEMAS[schema], schema) } : {}),
      ...(tools ? { tools: [TOOL] } : {}),
    };
    const runner = client.chat.completions.stream({ ...body, ...more }, options);
    const events = [];
    for (const kind of ["chunk", "content.delta", "content.done", "tool_calls.function.arguments.done"]) {
      runner.on(kind, () => events.push(kind));
    }
    const final = await runner.finalChatCompletion();
    return { events, completion: wire(final), parsed: final.choices[0].message.parsed ?? null };
  },

  async tools(client, { ask }) {
    const [body, options] = split(ask);
    const first = await client.chat.completions.create({ ...body, tools: [TOOL] }, options);
    const wanted = first.choices[0].message;
    const messages = [...body.messages, wanted];
    for (const call of wanted.tool_calls ?? []) {
      const { a, b } = JSON.parse(call.function.arguments);
      messages.push({ role: "tool", tool_call_id: call.id, content: String(a + b) });
    }
    const second = await client.chat.completions.create({ ...body, messages, tools: [TOOL] }, options);
    return { first: wire(first), second: wire(second) };
  },

  // Raw text, not a chat.
  async complete(client, { ask }) {
    const completion = await client.completions.create(...split(ask));
    return { completion: wire(completion), request_id: completion._request_id };
  },

  async complete_stream(client, { ask }) {
    const [body, options] = split(ask);
    const result = { chunks: [] };
    try {
      for await (const chunk of await client.completions.create({ ...body, stream: true }, options)) {
        result.chunks.push(wire(chunk));
      }
    } catch (error) {
      result.error = failure(error);
    }
    return result;
  },

  async embed(client, { ask }) {
    const embedded = await client.embeddings.create(...split(ask));
    return { embedded: wire(embedded), request_id: embedded._request_id };
  },

  async respond(client, { ask }) {
    const response = await client.responses.create(...split(ask));
    return { response: wire(response), text: response.output_text, request_id: response._request_id };
  },

  async respond_stream(client, { ask }) {
    const [body, options] = split(ask);
    const result = { events: [] };
    try {
      for await (const event of await client.responses.create({ ...body, stream: true }, options)) {
        result.events.push(wire(event));
      }
    } catch (error) {
      result.error = failure(error);
    }
    return result;
  },

  async respond_parse(client, { ask, schema }) {
    const [body, options] = split(ask);
    const text = { format: zodTextFormat(SCHEMAS[schema], schema) };
    return { parsed: (await client.responses.parse({ ...body, text }, options)).output_parsed };
  },

  async respond_accumulate(client, { ask, schema }) {
    const [body, options] = split(ask);
    const more = schema ? { text: { format: zodTextFormat(SCHEMAS[schema], schema) } } : {};
    const runner = client.responses.stream({ ...body, ...more }, options);
    const events = [];
    runner.on("event", (event) => events.push(event.type));
    const final = await runner.finalResponse();
    return { events, text: final.output_text, parsed: final.output_parsed ?? null };
  },

  async respond_tools(client, { ask, kept }) {
    const [body, options] = split(ask);
    const tools = [{ type: "function", ...TOOL.function }];
    const first = await client.responses.create({ ...body, tools }, options);
    const results = [];
    for (const item of first.output.filter((item) => item.type === "function_call")) {
      const { a, b } = JSON.parse(item.arguments);
      results.push({ type: "function_call_output", call_id: item.call_id, output: String(a + b) });
    }
    const more = kept
      ? { input: results, previous_response_id: first.id }
      : { input: [{ role: "user", content: body.input }, ...first.output, ...results] };
    const second = await client.responses.create({ ...body, tools, ...more }, options);
    return { first: wire(first), second: wire(second), text: second.output_text };
  },

  async keep(client, { ask, then }) {
    const first = await client.responses.create(ask);
    const second = await client.responses.create({ ...then, previous_response_id: first.id });
    const read = await client.responses.retrieve(second.id);
    const items = [];
    for await (const item of client.responses.inputItems.list(second.id, { limit: 2 })) items.push(wire(item));
    await client.responses.delete(first.id);
    const gone = [];
    for (const way of [
      () => client.responses.retrieve(first.id),
      () => client.responses.create({ ...then, previous_response_id: second.id }),
    ]) {
      try {
        await way();
      } catch (error) {
        gone.push(failure(error));
      }
    }
    return { second: wire(second), read: wire(read), items, gone };
  },

  async models(client) {
    const models = [];
    for await (const model of client.models.list()) models.push(wire(model));
    return { models };
  },

  async model(client, { id }) {
    return { model: wire(await client.models.retrieve(id)) };
  },

  async get(client, { path }) {
    return { got: await client.get(path) };
  },

  async abort(client, { ask, after }) {
    const [body, options] = split(ask);
    const controller = new AbortController();
    const asking = client.chat.completions.create(body, { ...options, signal: controller.signal });
    const outcome = asking.then(() => "answered", failure);
    await new Promise((resolve) => setTimeout(resolve, after * 1000));
    const left_at = now();
    controller.abort();
    return { left_at, outcome: await outcome };
  },
};

async function obey({ client: { base_url, api_key, max_retries, timeout, default_headers }, do: way, ...order }) {
  const client = new OpenAI({
    baseURL: base_url,
    apiKey: api_key,
    ...(max_retries === undefined ? {} : { maxRetries: max_retries }),
    ...(timeout === undefined ? {} : { timeout: timeout * 1000 }),
    defaultHeaders: default_headers ?? {},
  });
  const started = now();
  let result;
  try {
    result = await WAYS[way](client, order);
  } catch (error) {
    result = { error: failure(error) };
  }
  return { ...result, seconds: now() - started };
}

const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
say({ version: VERSION });
for await (const line of createInterface({ input: process.stdin })) say(await obey(JSON.parse(line)));
