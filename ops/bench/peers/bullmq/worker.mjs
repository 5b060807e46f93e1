// node worker.mjs: BENCH_SLOTS jobs at once.
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "bullmq";
import { begin, connection, end, queueName } from "./common.mjs";

const worker = new Worker(
  queueName,
  async (job) => {
    const { number, ms } = job.data;
    begin(number);
    if (ms) await sleep(ms);
    end(number);
    return { number };
  },
  { connection, concurrency: Number(process.env.BENCH_SLOTS), stalledInterval: Number(process.env.BENCH_STALLED_MS) },
);
worker.on("error", (error) => console.error(error));
process.on("SIGTERM", async () => {
  await worker.close();
  process.exit(0);
});
