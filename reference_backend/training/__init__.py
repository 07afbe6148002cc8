"""How the default model was made: the text it learnt from, the training run, the examination."""
