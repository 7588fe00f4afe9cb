package volume

import (
	"os"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }
