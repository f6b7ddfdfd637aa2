"""The ground floor: errors, paths, files and folders, and the words for sizes. It imports nothing of the package."""
