// Runs around a report's frame in a notebook, as its onload: `this` is the frame. The two share no origin, so they
// talk in messages. The frame is told whether the notebook is dark, which is often not what the system is; it tells
// of a wheel that moves nothing in it (framed.js), for notebooks that scroll by script and hear no wheel of a frame.
const pen = document.createElement("canvas").getContext("2d");
pen.fillStyle = getComputedStyle(this).color;
pen.fillRect(0, 0, 1, 1);
const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
this.contentWindow.postMessage({ dark: red + green + blue > 382 }, "*");
window.removeEventListener("message", this.hear);
this.hear = (event) => {
  if (!this.isConnected) window.removeEventListener("message", this.hear);
  else if (event.source === this.contentWindow && event.data?.wheel)
    this.dispatchEvent(new WheelEvent("wheel", { ...event.data.wheel, bubbles: true, cancelable: true }));
};
window.addEventListener("message", this.hear);
