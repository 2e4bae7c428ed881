"""What each part of the guard adds: fine-tunes of the bundled model with one budget, judged by one measure."""
