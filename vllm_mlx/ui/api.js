// The server as the pages see it: requests with the API key, streams as events, and errors as sentences.

export class ApiError extends Error {
  /** `status` 0: the server could not be reached. */
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "vllm-mlx-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  set(value, isKept) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (value) (isKept ? localStorage : sessionStorage).setItem(KEY, value);
  },
};

/** The answer's Response; what went wrong is an ApiError, an abort stays an AbortError. */
export async function request(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ApiError(answer?.error?.message ?? `The server answered with status ${response.status}.`, response.status,
    Number(response.headers.get("retry-after")) || null);
}

/** Each `data:` of a stream of server-sent events, parsed; ends at [DONE] or at the stream's end. Several may be read
 *  from one piece, so that a fast stream costs one turn of the event loop for many tokens. */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      const batch = [];
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") { yield batch; return; }
        batch.push(JSON.parse(data));
      }
      if (batch.length) yield batch;
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
