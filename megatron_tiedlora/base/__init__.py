"""The ground floor: errors, paths, files, folders and the wording of sizes. It imports no other package of ours."""
