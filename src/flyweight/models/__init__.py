"""Models in torch: where their parts are, how they are loaded, saved and cut."""
