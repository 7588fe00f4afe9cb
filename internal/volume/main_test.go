package volume

import (
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Isolate(m) }
