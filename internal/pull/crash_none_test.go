package pull

func helper() (int, bool) { return 0, false }
