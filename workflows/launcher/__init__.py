"""Gets ComfyUI, prepares an environment for it, starts it and runs workflows in it, for commands and tests."""
