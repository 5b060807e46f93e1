// Hands in what lines of JSON say: see ../producer.py.
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { Queue, QueueEvents } from "bullmq";
import { begun, connection, now, queueName } from "./common.mjs";

const BATCH = 1000;
const RESULT_TIMEOUT_MS = 30_000;
const text = "x".repeat(160);
const queue = new Queue(queueName, { connection });
const events = new QueueEvents(queueName, { connection });
await events.waitUntilReady();

function answer(value) {
  process.stdout.write(JSON.stringify(value) + "\n");
}

async function timed(work) {
  const began = now();
  const cpu = process.cpuUsage();
  await work();
  const used = process.cpuUsage(cpu);
  return { seconds: now() - began, cpu_s: (used.user + used.system) / 1e6 };
}

const doing = {
  submit: ({ first, count, ms }) =>
    timed(async () => {
      for (let number = first; number < first + count; number++) await queue.add("bench", { number, ms, text });
    }),
  submit_many: ({ first, count, ms }) =>
    timed(async () => {
      for (let start = first; start < first + count; start += BATCH) {
        const size = Math.min(BATCH, first + count - start);
        const jobs = Array.from({ length: size }, (_, n) => ({ name: "bench", data: { number: start + n, ms, text } }));
        await queue.addBulk(jobs);
      }
    }),
  one_at_a_time: async ({ first, count }) => {
    const figures = { call_ms: [], pick_up_ms: [], round_trip_ms: [] };
    for (let number = first; number < first + count; number++) {
      await sleep(10 + 40 * Math.random());
      const began = now();
      const job = await queue.add("bench", { number, ms: 0, text });
      figures.call_ms.push(1000 * (now() - began));
      await job.waitUntilFinished(events, RESULT_TIMEOUT_MS);
      figures.round_trip_ms.push(1000 * (now() - began));
      figures.pick_up_ms.push(1000 * (begun(number) - began));
    }
    return figures;
  },
};

answer({ ready: true, batches: true });
for await (const line of createInterface({ input: process.stdin })) {
  const { do: what, ...rest } = JSON.parse(line);
  answer(await doing[what](rest));
}
process.exit(0);
