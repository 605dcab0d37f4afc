// An agent in JavaScript without any package: streams chat completions and calls a tool.
// The task is on standard input; the answer goes to standard output.
import { readFileSync } from "node:fs";

const tools = [
  {
    type: "function",
    function: {
      name: "look",
      description: "Look a word up.",
      parameters: { type: "object", properties: { word: { type: "string" } }, required: ["word"] },
    },
  },
];

async function ask(messages) {
  const reply = await fetch(`${process.env.OPENAI_BASE_URL}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${process.env.OPENAI_API_KEY}` },
    body: JSON.stringify({ model: process.env.OPENAI_MODEL, messages, tools, stream: true }),
  });
  if (!reply.ok) throw new Error(await reply.text());
  const message = { role: "assistant", content: "", tool_calls: [] };
  let text = "";
  for await (const piece of reply.body.pipeThrough(new TextDecoderStream())) text += piece;
  for (const event of text.split("\n\n")) {
    const data = event.replace(/^data: /, "");
    if (!data || data === "[DONE]") continue;
    const delta = JSON.parse(data).choices[0].delta;
    message.content += delta.content ?? "";
    for (const { index, ...call } of delta.tool_calls ?? []) message.tool_calls[index] = call;
  }
  if (!message.tool_calls.length) delete message.tool_calls;
  return message;
}

const messages = [{ role: "user", content: readFileSync(0, "utf8") }];
for (;;) {
  const message = await ask(messages);
  messages.push(message);
  if (!message.tool_calls) {
    console.log(message.content);
    break;
  }
  for (const call of message.tool_calls) {
    const { word } = JSON.parse(call.function.arguments);
    messages.push({ role: "tool", tool_call_id: call.id, content: `w${word}` });
  }
}
