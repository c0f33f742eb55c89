"""How the commands and the tests get ComfyUI, prepare an environment for it, start it and run workflows in it."""
