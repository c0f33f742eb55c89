import { app } from "../../scripts/app.js";

// The server reads the values from the user's settings: see nodes/settings.py.
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
    {
      id: "Understudy.RequireConsent",
      category: ["Understudy", "Consent", "Require"],
      name: "Require consent",
      tooltip:
        "Stops Load and Train nodes and Label Media, instead of warning, where a consent record is missing, out of " +
        "date or for another purpose. The environment variable UNDERSTUDY_REQUIRE_CONSENT overrides this setting.",
      type: "boolean",
      defaultValue: false,
    },
  ],
});
