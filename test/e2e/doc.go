// Package e2e tests Larder as its users have it: the built programs, started as
// processes, behind real Docker engines (Debian's and a current one), with real
// containers of different users.
//
// Each test has a node of its own: a store, a state, a plugin process and a
// driver name. Engines are shared by the tests that leave them alone; a test
// that kills its engine starts one of its own.
package e2e
