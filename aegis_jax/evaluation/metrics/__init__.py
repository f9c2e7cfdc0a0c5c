"""Figures of what an erasure leaves: functions of answers, labels and features, which say nothing of where these come
from. docs/judges.md tells what each means and against what it is checked.

  canvas        UA, IRA and CRA as UnlearnCanvas defines them
  frechet       Frechet distance of two sets of images, by features
  similarity    CLIP score; which of several words an image is nearest to (CARE's score)
  neighbours    the words most like a concept, and how often a model still shows each of a list
  diagnostics   d0, d1, d2: distances of noise predictions
  composition   on the world: what else a prompt with or without the concept asked for, several attributes at once

Every share has its count, n and Wilson interval (`interval.share`); no figure depends on what else stands in a table.
"""
