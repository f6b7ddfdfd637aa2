"""The ground floor: errors and words, files and folders. It imports no other package of ours."""
