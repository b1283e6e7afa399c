// What the JavaScript client of Hugging Face reads of a repository, and sends to it. Arguments: hub, token, command, JSON.
import { commit, createBranch, downloadFile, listCommits, listFiles } from "@huggingface/hub";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

const [hubUrl, accessToken, command, text] = process.argv.slice(2);
const { repo, branch, revision, title, files, start } = JSON.parse(text);
const common = { repo, hubUrl, accessToken };
const found = [];
if (command === "commits") {
  for await (const entry of listCommits({ ...common, revision })) found.push({ sha: entry.oid, title: entry.title, body: entry.message });
} else if (command === "files") {
  for await (const entry of listFiles({ ...common, revision, recursive: true })) {
    if (entry.type !== "file") continue;
    const blob = await downloadFile({ ...common, revision, path: entry.path });
    const bytes = Buffer.from(await blob.arrayBuffer());
    found.push({ path: entry.path, size: entry.size, lfs: entry.lfs?.oid ?? "", sha256: createHash("sha256").update(bytes).digest("hex") });
  }
} else if (command === "send") {
  if (start) await createBranch({ ...common, branch });
  const operations = Object.entries(files).map(([path, source]) => ({
    operation: "addOrUpdate", path, content: new Blob([readFileSync(source)]),
  }));
  found.push((await commit({ ...common, branch, title, operations, useXet: false })).commit.oid);
}
console.log(JSON.stringify(found));
