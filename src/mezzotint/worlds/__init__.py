"""Where it fits: the embedded data set, a procedural world of captioned scenes, and an exact judge of pictures.

In: scenes, their pictures at any size, their captions, splits, and the way back from a picture to a scene.
Out: batches (`data.worlds`), scores of models (`evals.worlds`).
Gotchas: a description's world is closed: "a star" is a picture of one star and of nothing else.
"""
