"""What runs models that take and give tensors: a module here for each `executor` that a model.toml may name.

Such a module has one function, `opened`, in the form of `reference_backend.tensors.Opened`.
"""
