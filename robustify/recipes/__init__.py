"""The recipes: one module and one YAML file each; the folder listing is the registry.

A recipe module has a docstring (method, citation, formula) and

    def stages(student, teachers, *, threat, attack, …) -> Iterator[Objective]

which trains nothing itself: it yields one Objective per stage, and what stands behind a `yield`
runs after that Objective has been trained. The keyword-only parameters are what its YAML may set.
"""
