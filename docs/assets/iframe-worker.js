// Browsers refuse workers on pages opened from disk. There, a worker is a hidden frame that runs the same script.
if (location.protocol === "file:") {
  // Runs inside the frame: messages are then seen to come from it.
  const inFrame = () => {
    window.postMessage = (data) => parent.postMessage(data, "*");
    window.importScripts = async (...addresses) => {
      for (const src of addresses)
        await new Promise((onload, onerror) => {
          document.body.append(Object.assign(document.createElement("script"), { src, onload, onerror }));
        });
    };
  };
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = Object.assign(document.createElement("iframe"), { hidden: true });
      window.addEventListener("message", ({ source, data }) => {
        if (source === frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      const start = () => {
        document.body.append(frame);
        const inside = frame.contentWindow;
        inside.document.open();
        inside.document.write(`<!doctype html><body><script>(${inFrame})()<` + "/script></body>");
        inside.document.close();
        inside.importScripts(new URL(url, location.href).href).then(() => {
          this.inside = inside;
          for (const data of this.waiting.splice(0)) this.postMessage(data);
        });
      };
      if (document.body) start(); else addEventListener("DOMContentLoaded", start);
    }
    postMessage(data) {
      if (!this.inside) this.waiting.push(data);
      else this.inside.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) }));
    }
  };
}
