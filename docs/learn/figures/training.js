// A network that learns a task in the page: the playground of the page of a trace.

import { Playground } from "../../../src/cellstack/inspect/page/playground.js";
import { Runner } from "../../../src/cellstack/inspect/page/runner.js";
import { figure } from "./common.js";

figure("training", (page) => {
  const playground = new Playground(page, new Runner());
  page.add(playground.element);
  playground.open = true;
  return () => playground.draw();
});
