"""The commands of `litflora`, one file each; the heavy ones are imported when they are run."""
