// Files of texts, read as emo-serve reads them: a .txt file is one document, a .jsonl file has one
// per line, a string, {"text": ...} or {"messages": [...]}.

/** Return a file's documents; throws an Error that names file and line. */
export function readExamples(name, text) {
  if (!name.toLowerCase().endsWith(".jsonl")) {
    if (!text.trim()) throw new Error(`${name} has no text`);
    return [text];
  }
  const found = [];
  text.split("\n").forEach((line, place) => {
    if (!line.trim()) return;
    let read;
    try {
      read = JSON.parse(line);
    } catch {
      throw new Error(`${name}, line ${place + 1} is no JSON`);
    }
    if (
      typeof read !== "string" &&
      typeof read?.text !== "string" &&
      !Array.isArray(read?.messages)
    ) {
      throw new Error(
        `${name}, line ${place + 1} is neither a string nor has "text" or "messages"`,
      );
    }
    found.push(read);
  });
  if (!found.length) throw new Error(`${name} has no documents`);
  return found;
}
