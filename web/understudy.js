import { app } from "../../scripts/app.js";

// The server reads the value from the user's settings when it starts; see is_shown in nodes/puppets/menus.py.
app.registerExtension({
  name: "Understudy",
  settings: [
    {
      id: "Understudy.Theatre",
      category: ["Understudy", "Theatre", "Show"],
      name: "Show the puppet theatre",
      tooltip:
        "Lists the nodes and checkpoints of the puppet theatre in the menus. Takes effect after a restart of " +
        "ComfyUI. The environment variable UNDERSTUDY_THEATRE overrides this setting.",
      type: "boolean",
      defaultValue: true,
    },
  ],
});
