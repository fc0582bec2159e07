// Conversations in the browser's own database (pictures are too big for localStorage); settings in localStorage.

const NAME = "vllm-mlx";

function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("conversations", { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** Falls back to memory where the browser forbids a database (some private windows); `isKept` says which it is. */
export class Store {
  #db = null;
  #memory = new Map();
  isKept = true;

  async start() {
    try { this.#db = await open(); } catch { this.isKept = false; }
  }

  #run(mode, act) {
    return new Promise((resolve, reject) => {
      const transaction = this.#db.transaction("conversations", mode);
      const asked = act(transaction.objectStore("conversations"));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }

  /** All conversations, the last used first. */
  async all() {
    const found = this.#db ? await this.#run("readonly", (store) => store.getAll()) : [...this.#memory.values()];
    return found.sort((a, b) => b.updated - a.updated);
  }

  async put(conversation) {
    if (this.#db) await this.#run("readwrite", (store) => store.put(structuredClone(conversation)));
    else this.#memory.set(conversation.id, conversation);
  }

  async delete(id) {
    if (this.#db) await this.#run("readwrite", (store) => store.delete(id));
    else this.#memory.delete(id);
  }
}

export function readSettings(defaults) {
  try { return { ...defaults, ...JSON.parse(localStorage.getItem("settings") ?? "{}") }; } catch { return { ...defaults }; }
}

export function writeSettings(settings) {
  localStorage.setItem("settings", JSON.stringify(settings));
}
