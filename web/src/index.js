export { load, Network } from "./network.js";
export { Stream } from "./stream.js";
