"""The method of ComKD-CLIP (arXiv 2408.04145) on PromptKD (arXiv 2403.02781): a file a section."""
