"""The steps that change a model. They never import one another: recipes combine them."""
