// An agent in JavaScript with the npm package `openai`: the Responses API, a tool, previous_response_id.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY are in the environment
const tools = [
  {
    type: "function",
    name: "look",
    description: "Look a word up.",
    parameters: { type: "object", properties: { word: { type: "string" } }, required: ["word"] },
  },
];
let request = { input: readFileSync(0, "utf8") };
for (;;) {
  const response = await client.responses.create({ model: process.env.OPENAI_MODEL, tools, ...request });
  const calls = response.output.filter((item) => item.type === "function_call");
  if (!calls.length) {
    console.log(response.output_text);
    break;
  }
  const input = calls.map((call) => ({
    type: "function_call_output",
    call_id: call.call_id,
    output: `w${JSON.parse(call.arguments).word}`,
  }));
  request = { input, previous_response_id: response.id };
}
