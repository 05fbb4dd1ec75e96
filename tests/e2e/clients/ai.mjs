// One conversation, streamed, with a tool call, by the Vercel AI SDK; prints what its user would see.
//
//     node ai.mjs PROVIDER BASE_URL MODEL QUESTION
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [provider, baseURL, model, prompt] = process.argv.slice(2);
const called = [];
const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => {
    called.push(city);
    return `21 degrees in ${city}`;
  },
});
const made = {
  "ai-compatible": () => createOpenAICompatible({ name: "mine", baseURL, apiKey: "unused" })(model),
  "ai-openai": () => createOpenAI({ baseURL, apiKey: "unused" }).chat(model),
};
const failures = [];
const result = streamText({
  model: made[provider](),
  prompt,
  tools: { weather },
  stopWhen: stepCountIs(4),
  maxRetries: 0,
  onError: ({ error }) => failures.push(String(error)),
});
const pieces = [];
for await (const piece of result.textStream) pieces.push(piece);
if (failures.length) throw new Error(failures.join("; "));
console.log(JSON.stringify({ text: pieces.join(""), pieces: pieces.length, called }));
