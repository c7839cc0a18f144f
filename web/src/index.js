export { FormatError } from "./description.js";
export { load, Network } from "./network.js";
export { Stream } from "./stream.js";
