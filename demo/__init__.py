"""The main job: a real headless ComfyUI compares the teacher with its combined UNet."""
