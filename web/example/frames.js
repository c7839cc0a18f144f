// Runs on the audio thread: joins the microphone's samples to frames, and posts them to the page.

class Frames extends AudioWorkletProcessor {
  constructor({ processorOptions: { length } }) {
    super();
    this.frame = new Float32Array(length);
    this.count = 0;
  }
  process([[samples]]) {
    for (let at = 0; samples !== undefined && at < samples.length; ) {
      const taken = samples.subarray(at, at + this.frame.length - this.count);
      this.frame.set(taken, this.count);
      this.count += taken.length;
      at += taken.length;
      if (this.count < this.frame.length) break;
      this.port.postMessage(this.frame.slice());
      this.count = 0;
    }
    return true;
  }
}
registerProcessor("frames", Frames);
